"""FirstLlama against fresh objects, its parent's behaviour and a plain torch forward."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny
from native_model import opened

from pyfirst import FirstBatch, FirstLlama, InputError, native
from pyfirst.llama import pick_threshold

F32 = {"type_k": 0, "type_v": 0, "n_ctx": 256}
GREEDY = {"temperature": 0.0, "max_tokens": 8}


def tokens_of(llm: FirstLlama, prompt: list[int], n: int = 8, **kwargs) -> list[int]:
    """Greedy tokens for a prompt of token ids."""
    found: list[int] = []
    for token in llm.generate(prompt, temp=0.0, **kwargs):
        found.append(token)
        if len(found) == n:
            break
    return found


def torch_tokens(folder, mask, prompt: list[int], prefill: str, n: int = 8) -> list[int]:
    net = tiny.load(folder)
    found: list[int] = []
    for _ in range(n):
        found.append(int(tiny.gold(net, mask, prompt, found, prefill)[-1].argmax()))
    return found


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_masks_and_greedy_tokens_equal_torch(prefill, files):
    folder, recipe, path = files[prefill]
    llm = FirstLlama(path, **F32)
    seen = set()
    for seed in range(6):
        prompt = tiny.prompt(10 + 7 * seed, seed)
        mask, scores = tiny.decide(folder, recipe, prompt)
        assert tokens_of(llm, prompt) == torch_tokens(folder, mask, prompt, prefill)
        assert llm.routing is not None and (llm.routing.mask == mask).all()
        np.testing.assert_allclose(llm.routing.scores, scores, atol=1e-5)
        seen.add(mask.tobytes())
    assert len(seen) > 1


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_evaluating_nothing_changes_nothing(prefill, files):
    llm, prompt = FirstLlama(files[prefill][2], **F32), tiny.prompt(20)
    expected = tokens_of(FirstLlama(files[prefill][2], **F32), prompt)
    llm.eval([])
    assert llm.n_tokens == 0 and llm.routing is None
    llm.eval(prompt)
    llm.eval([])
    assert llm.n_tokens == 20
    steps = llm.generate([expected[0]], temp=0.0, reset=False)
    assert [next(steps) for _ in range(7)] == expected[1:]


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_reused_prefixes_give_what_a_fresh_object_gives(prefill, files):
    path = files[prefill][2]
    system = tiny.prompt(20, 1)
    prompts = [system + tiny.prompt(9, 2), system + tiny.prompt(12, 3), system, system + tiny.prompt(9, 2)]
    llm = FirstLlama(path, **F32)
    # Growing chat: each prompt holds the last answer.
    prompts.append(prompts[-1] + tokens_of(FirstLlama(path, **F32), prompts[-1]) + tiny.prompt(5, 4))
    for prompt in [*prompts, *prompts[::-1]]:
        fresh = FirstLlama(path, **F32)
        assert tokens_of(llm, prompt) == tokens_of(fresh, prompt)
        assert llm.routing is not None and fresh.routing is not None
        assert (llm.routing.mask == fresh.routing.mask).all()


def test_full_reuses_the_common_dense_prefix(files, monkeypatch):
    """Not only right: the shared prompt is not computed again."""
    llm = FirstLlama(files["full"][2], **F32)
    system = tiny.prompt(50, 1)
    tokens_of(llm, [*system, 7, 8, 9])
    evaluated: list[int] = []
    parent = llama_cpp.Llama.eval
    monkeypatch.setattr(
        llama_cpp.Llama, "eval", lambda self, tokens: (evaluated.append(len(tokens)), parent(self, tokens))[1]
    )
    tokens_of(llm, [*system, 10, 11], 1)
    assert evaluated[0] == 2


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_prompt_asked_again_has_the_logits_of_the_first_time_to_the_last_bit(prefill, files):
    """And those of FirstBatch; with the cache in float16, also where n_batch leaves one token over."""
    path, asked = files[prefill][2], {"max_tokens": 1, "temperature": 0.0, "logprobs": 20}
    with FirstBatch(path, n_parallel=1, n_ctx=256, n_batch=32) as batch:
        llm = FirstLlama(path, n_ctx=256, n_batch=32)
        for n in (1, 2, 3, 31, 33, 65):
            prompt = tiny.prompt(n, n)
            truth = batch.generate([prompt], **asked)[0]["choices"][0]["logprobs"]["top_logprobs"]
            for _ in range(2):
                assert llm.create_completion(prompt, **asked)["choices"][0]["logprobs"]["top_logprobs"] == truth


def test_forced_routed_and_dense_calls_mix(files):
    folder, recipe, path = files["full"]
    llm = FirstLlama(path, **F32)
    prompt, mask = tiny.prompt(15, 5), np.array([1, 0, 1, 1], bool)
    text = llm.detokenize(prompt).decode("utf-8", "ignore")
    ids = llm.tokenize(text.encode(), add_bos=False, special=True)
    routed, _ = tiny.decide(folder, recipe, ids)
    for _ in range(2):
        for forced in (mask, None, np.ones(4, bool)):
            result = llm.create_completion(text, mask=forced, **GREEDY)
            expected = routed if forced is None else forced
            assert result["first"]["skipped"] == np.flatnonzero(~expected).tolist()
            assert (
                llm.input_ids[len(ids) : len(ids) + 8].tolist()[:7] == torch_tokens(folder, expected, ids, "full")[:7]
            )


@pytest.mark.parametrize("n_batch", [8, 32, 256])
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_decision_does_not_depend_on_batch_size(n_batch, prefill, files):
    folder, recipe, path = files[prefill]
    llm = FirstLlama(path, n_batch=n_batch, n_ubatch=max(1, n_batch // 2), **F32)
    for length in (1, 31, 32, 33, 100):
        prompt = tiny.prompt(length, length)
        mask, _ = tiny.decide(folder, recipe, prompt)
        tokens_of(llm, prompt, 1)
        assert llm.routing is not None and (llm.routing.mask == mask).all()


def test_sticky_keeps_the_first_decision(files):
    path = files["full"][2]
    llm = FirstLlama(path, sticky=True, **F32)
    first = tiny.prompt(12, 0)
    answer = tokens_of(llm, first)
    assert llm.routing is not None
    mask = llm.routing.mask
    decided = llm.routing
    tokens_of(llm, [*first, 7])
    assert llm.routing is decided
    tokens_of(llm, first)
    grown = first + answer + tiny.prompt(30, 8)
    tokens_of(llm, grown)
    assert (llm.routing.mask == mask).all()
    llm.reset()
    tokens_of(llm, grown)
    fresh = FirstLlama(path, **F32)
    tokens_of(fresh, grown)
    assert fresh.routing is not None and (llm.routing.mask == fresh.routing.mask).all()
    assert (fresh.routing.mask != mask).any()  # or the test shows nothing


def letters(llm) -> dict[int, float]:
    """Logit bias that keeps a random model to ASCII, where the parent counts and cuts as it should."""
    return {i: 60.0 for i in range(tiny.VOCAB - 7) if llm.detokenize([i]).isalnum() and llm.detokenize([i]).isascii()}


def test_results_are_the_parents_plus_first(files, tiny_model):
    """With all layers kept, completion, chat and streams equal llama_cpp.Llama's."""
    path = tiny_model("llama")[1]
    parent = llama_cpp.Llama(str(path), verbose=False, **F32)
    llm = FirstLlama(path, **F32)
    messages = [{"role": "user", "content": "the quick brown fox"}]
    options = {**GREEDY, "logit_bias": letters(parent)}

    def cleaned(result):
        return {k: v for k, v in result.items() if k not in ("id", "created", "first", "model")}

    mine, theirs = llm("the lazy dog", **options), parent("the lazy dog", **options)
    assert cleaned(mine) == cleaned(theirs) and len(mine["choices"][0]["text"]) >= 8
    assert mine["first"] == {"n_layer": 4, "kept": 4, "skipped": [], "prefill": "full"}
    chat = llm.create_chat_completion(messages, **options)
    assert cleaned(chat) == cleaned(parent.create_chat_completion(messages, **options))
    assert chat["first"]["n_layer"] == 4
    for call in ("create_completion", "create_chat_completion"):
        prompt = "the lazy dog" if call == "create_completion" else messages
        streamed = list(getattr(llm, call)(prompt, stream=True, **options))
        assert [cleaned(c) for c in streamed] == [
            cleaned(c) for c in getattr(parent, call)(prompt, stream=True, **options)
        ]
        assert all(c["first"]["kept"] == 4 for c in streamed)


def test_a_tokenizer_of_transformers_gives_the_same_text(tiny_model):
    """Also characters of several tokens, where each token alone is none, and BOS where the model wants it."""
    folder, path = tiny_model("llama")
    other = llama_cpp.llama_tokenizer.LlamaHFTokenizer.from_pretrained(str(folder))
    answer = "é 😀 🦙 日本語 ї"
    for add_bos in (False, True):
        options = {**F32, "routing": False, "kv_overrides": {"tokenizer.ggml.add_bos_token": add_bos}}
        llm, mine = FirstLlama(path, **options), FirstLlama(path, tokenizer=other, **options)
        tokens = llm.tokenize(answer.encode(), add_bos=False)
        assert len(tokens) > len(answer)
        for one in (llm, mine):
            steps = itertools.cycle(tokens)

            def only(_, scores, steps=steps):
                scores[next(steps)] = 1e9
                return scores

            call = {"logits_processor": [only], "max_tokens": len(tokens), "temperature": 0.0}
            result = one.create_completion("the quick", **call)
            assert result["choices"][0]["text"] == answer
            streamed = one.create_completion("the quick", stream=True, **call)
            assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == answer
            assert (one.input_ids[0] == one.token_bos()) == add_bos
            assert result["usage"]["prompt_tokens"] == len(llm.tokenize(b"the quick"))


@pytest.mark.parametrize("kind", [llama_cpp.Llama, FirstLlama])
def test_verbose_prints_the_timings_of_each_answer(kind, tiny_model, capfd):
    llm = kind(str(tiny_model("llama")[1]), verbose=True, **F32)
    for stream in (False, True):
        capfd.readouterr()
        result = llm.create_completion("the quick", stream=stream, **GREEDY)
        assert not stream or list(result)
        assert capfd.readouterr().err.count("prompt eval time") == 1
    llama_cpp._logger.set_verbose(False)


def test_forced_mask_without_routers(tiny_model):
    folder, path = tiny_model("qwen3")
    for prefill in ("full", "skip"):
        llm = FirstLlama(path, skip_layers=[0, 2], prefill=prefill, **F32)
        prompt = tiny.prompt(12, 3)
        assert tokens_of(llm, prompt) == torch_tokens(folder, [0, 1, 0, 1], prompt, prefill)
        assert tokens_of(llm, prompt) == torch_tokens(folder, [0, 1, 0, 1], prompt, prefill)
        assert llm.routing is not None and llm.routing.scores is None


def test_a_file_without_routers_says_that_it_runs_dense(tiny_model, caplog):
    FirstLlama(tiny_model("llama")[1], **F32)
    assert "no routers" in caplog.text
    caplog.clear()
    FirstLlama(tiny_model("llama")[1], routing=False, **F32)
    assert not caplog.text


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_vocabulary_alone_reads_and_writes_text(prefill, files, caplog):
    llm, whole = FirstLlama(files[prefill][2], vocab_only=True), FirstLlama(files[prefill][2], **F32)
    tokens = llm.tokenize(b"the quick", special=True)
    assert tokens == whole.tokenize(b"the quick", special=True) and llm.detokenize(tokens) == b"the quick"
    assert llm.chat_tokens([{"role": "user", "content": "x"}]) and not caplog.text
    assert pickle.loads(pickle.dumps(llm)).tokenize(b"the quick", special=True) == tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": False},
        {"threshold": 0.6},
        {"skip": 0.4, "sticky": True},
        {"prefill": "skip"},
        {"skip_layers": [1, 2], "prefill": "skip"},
        {"mask": [1, 0, 1, 1], "routing": False},
    ],
)
def test_copies_decide_as_the_original(options, files):
    llm = FirstLlama(files["full"][2], **options, **F32)
    messages = [{"role": "user", "content": "the lazy dog"}]
    expected = llm.create_chat_completion(messages, **GREEDY)
    for other in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
        found = other.create_chat_completion(messages, **GREEDY)
        assert (found["choices"], found["first"]) == (expected["choices"], expected["first"])
        assert (other.threshold, other.sticky, other.prefill) == (llm.threshold, llm.sticky, llm.prefill)


def test_the_default_seed_differs_and_a_given_one_does_not(files):
    path = files["full"][2]

    def answer(**kwargs) -> str:
        return FirstLlama(path, **F32, **kwargs)("the quick", max_tokens=12, temperature=1.0)["choices"][0]["text"]

    assert len({answer() for _ in range(4)}) > 1
    assert answer(seed=5) == answer(seed=5)


def test_skip_is_between_what_was_measured_and_all_layers(monkeypatch):
    points = np.array([0.3, 0.5], np.float32), np.array([0.9, 0.6], np.float32)
    monkeypatch.setattr(native, "calibration", lambda model: points)
    for skip, threshold in ((0, 0), (0.05, 0.15), (0.1, 0.3), (0.25, 0.4), (0.4, 0.5), (1, 0.5)):
        assert pick_threshold(0, "x", {}, None, skip) == pytest.approx(threshold)


def test_a_share_that_no_threshold_comes_near_is_told_once(monkeypatch, caplog):
    points = np.array([0.2, 0.5], np.float32), np.array([1.0, 0.75], np.float32)
    monkeypatch.setattr(native, "calibration", lambda model: points)
    for skip in (0, 0.05, 0.25, 0.3):
        pick_threshold(0, "single.gguf", {}, None, skip)
    assert not caplog.text
    for _ in range(2):
        pick_threshold(0, "single.gguf", {}, None, 0.5)
    assert [r.getMessage() for r in caplog.records if "skip=0.5 cannot" in r.getMessage() and "0.25" in r.getMessage()]
    assert len(caplog.records) == 1


def test_threshold_and_skip(files):
    path = files["full"][2]
    prompt = tiny.prompt(12, 3)
    everything, nothing = FirstLlama(path, threshold=0.0, **F32), FirstLlama(path, threshold=1.0, **F32)
    tokens_of(everything, prompt, 1)
    tokens_of(nothing, prompt, 1)
    assert everything.routing is not None and everything.routing.mask.all()
    assert nothing.routing is not None and not nothing.routing.mask.any()
    assert FirstLlama(path, skip=0.4, **F32).threshold == pytest.approx(0.5)
    assert FirstLlama(path, skip=0.2, **F32).threshold == pytest.approx(0.4)
    everything.threshold = 1.0
    tokens_of(everything, prompt, 1)
    assert not everything.routing.mask.any()


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_state_round_trip(prefill, files):
    path = files[prefill][2]
    llm = FirstLlama(path, **F32)
    prompts = [tiny.prompt(30, 1), tiny.prompt(120, 2)]
    states, truth = [], []
    for prompt in prompts:
        tokens_of(llm, prompt, 3)
        states.append(llm.save_state())
        truth.append(tokens_of(FirstLlama(path, **F32), prompt, 16))
    other = FirstLlama(path, **F32)
    for target in (llm, other):
        for i in (1, 0, 1, 0):
            target.load_state(pickle.loads(pickle.dumps(states[i])))
            done = target.n_tokens - len(prompts[i])
            following = target.generate(truth[i][done : done + 1], temp=0.0, reset=False)
            assert [next(following) for _ in range(16 - done - 1)] == truth[i][done + 1 :]
            assert tokens_of(target, prompts[i], 16) == truth[i]
    # Contexts of other sizes, one of them too small, and another process.
    for n_ctx in (512, 160):
        target = FirstLlama(path, **{**F32, "n_ctx": n_ctx, "n_batch": 64})
        for i in (1, 0):
            target.load_state(states[i])
            assert tokens_of(target, prompts[i], 16) == truth[i]
            assert target.routing is not None
    small = FirstLlama(path, **{**F32, "n_ctx": 64})
    tokens_of(small, prompts[0], 3)
    with pytest.raises(InputError, match=r"holds 12\d tokens, the context 64"):
        small.load_state(states[1])
    assert tokens_of(small, prompts[0], 16) == truth[0]
    code = (
        "import pickle, sys; from pyfirst import FirstLlama\n"
        "path, state, prompt, expected = pickle.load(sys.stdin.buffer)\n"
        f"llm = FirstLlama(path, **{F32})\n"
        "llm.load_state(state)\n"
        "assert (llm.routing.mask == state.first['routing'].mask).all()\n"
        "n = llm.n_tokens - len(prompt)\n"
        "steps = llm.generate(expected[n : n + 1], temp=0.0, reset=False)\n"
        "assert [next(steps) for _ in range(15 - n)] == expected[n + 1 :]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((path, states[1], prompts[1], truth[1])),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_states_that_do_not_fit_are_exceptions(prefill, files, tiny_model):
    path = files[prefill][2]
    prompt = tiny.prompt(30, 1)
    truth = tokens_of(FirstLlama(path, **F32), prompt, 16)
    llm, source = FirstLlama(path, **F32), FirstLlama(path, **F32)
    tokens_of(source, prompt, 3)
    state = source.save_state()
    plain = llama_cpp.Llama(str(path), verbose=False, **F32)
    plain.eval(prompt)
    other = FirstLlama(files["skip" if prefill == "full" else "full"][2], **F32)
    tokens_of(other, prompt, 3)
    dense = FirstLlama(tiny_model("qwen3")[1], **F32)
    tokens_of(dense, prompt, 3)
    old = pickle.loads(pickle.dumps(state))
    old.first["version"] = 0
    tokens_of(llm, prompt, 3)
    for wrong, message in (
        (plain.save_state(), "plain llama_cpp.Llama"),
        (other.save_state(), "another model file"),
        (dense.save_state(), "another model file"),
        (old, "version 0, expected 1"),
    ):
        before = llm.input_ids[: llm.n_tokens].tolist()
        with pytest.raises(InputError, match=message):
            llm.load_state(wrong)
        assert llm.input_ids[: llm.n_tokens].tolist() == before
    f16 = FirstLlama(path, **{**F32, "type_k": 1, "type_v": 1})
    with pytest.raises(RuntimeError):
        f16.load_state(state)
    size = len(state.llama_state)
    for cut in (0, 1, 4, 60, size // 2, size - 200, size - 9, size - 1):
        short = pickle.loads(pickle.dumps(state))
        short.llama_state, short.llama_state_size = short.llama_state[:cut], cut
        with pytest.raises(RuntimeError):
            llm.load_state(short)
        assert tokens_of(llm, prompt, 16) == truth
    short = pickle.loads(pickle.dumps(state))
    short.llama_state = short.llama_state[:-9]
    with pytest.raises(RuntimeError):
        llm.load_state(short)
    long = pickle.loads(pickle.dumps(state))
    long.llama_state += bytes(50)
    with pytest.raises(RuntimeError):
        llm.load_state(long)
    assert tokens_of(llm, prompt, 16) == truth


@pytest.mark.parametrize("prefill", ["full", "skip"])
@pytest.mark.parametrize("routers", [False, True])
def test_states_hold_masks_also_where_nothing_is_routed(routers, prefill, files, tiny_model):
    folder, path = (files[prefill][0], files[prefill][2]) if routers else tiny_model("qwen3")
    prompt, mask = tiny.prompt(20, 1), np.array([1, 0, 1, 1], bool)
    options = {**F32, "prefill": prefill, "routing": False}
    forced, dense = FirstLlama(path, mask=mask, **options), FirstLlama(path, **options)
    tokens_of(forced, prompt, 3)
    tokens_of(dense, prompt, 3)
    states = {True: pickle.loads(pickle.dumps(forced.save_state())), False: dense.save_state()}
    for one in (FirstLlama(path, **options), forced, dense):
        for masked in (True, False, True):
            keep = mask if masked else np.ones(4, bool)
            truth = torch_tokens(folder, keep, prompt, prefill, 10)
            one.load_state(states[masked])
            done = one.n_tokens - len(prompt)
            steps = one.generate(truth[done : done + 1], temp=0.0, reset=False)
            assert [next(steps) for _ in range(9 - done)] == truth[done + 1 :]
            assert one.routing is not None and (one.routing.mask == keep).all()


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("n", [1, 20])
def test_logits_of_a_loaded_prompt_are_those_of_a_fresh_object(scored, n, files):
    """Also where the state was saved by an object that keeps none but the last."""
    path, prompt = files["full"][2], tiny.prompt(n, 1)
    source, llm = FirstLlama(path, logits_all=scored, **F32), FirstLlama(path, logits_all=True, **F32)
    answer = tokens_of(source, prompt, 3)
    llm.load_state(pickle.loads(pickle.dumps(source.save_state())))
    following = llm.generate(answer[2:], temp=0.0, reset=False)
    assert [*answer, next(following)] == tokens_of(FirstLlama(path, **F32), prompt, 4)
    following.close()
    llm.load_state(source.save_state())
    call = {"max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 0}
    longer = [*prompt, *answer, 7, 8]
    fresh = FirstLlama(path, logits_all=True, **F32).create_completion(longer, **call)
    found = llm.create_completion(longer, **call)["choices"][0]["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(found[1:], fresh["choices"][0]["logprobs"]["token_logprobs"][1:], atol=1e-4)


def test_set_cache_gives_what_a_fresh_object_gives(files):
    path = files["full"][2]
    llm = FirstLlama(path, **F32)
    llm.set_cache(llama_cpp.LlamaRAMCache(1 << 24))
    prompts = [[*tiny.prompt(40, 1), 5], tiny.prompt(30, 2), [*tiny.prompt(40, 1), 9, 8]]
    for prompt in [*prompts, *prompts]:
        fresh = FirstLlama(path, **F32).create_completion(prompt, **GREEDY)
        found = llm.create_completion(prompt, **GREEDY)
        assert (found["choices"], found["first"]) == (fresh["choices"], fresh["first"])


def test_every_call_leaves_an_entry_in_the_cache(files):
    llm, cache = FirstLlama(files["full"][2], **F32), llama_cpp.LlamaRAMCache(1 << 24)
    llm.set_cache(cache)
    messages = [{"role": "user", "content": "the lazy dog"}]
    calls = (
        lambda: llm.create_completion("the quick", **GREEDY),
        lambda: llm.create_chat_completion(messages, **GREEDY),
        lambda: list(llm.create_completion("brown fox", stream=True, **GREEDY)),
        lambda: list(llm.create_chat_completion(messages * 2, stream=True, **GREEDY)),
    )
    for n, call in enumerate(calls, 1):
        call()
        assert len(cache.cache_state) == n


@pytest.mark.parametrize("theirs", ["plain", "file", "size", "kind"])
def test_states_in_a_cache_that_cannot_be_loaded_are_a_miss(theirs, files, tmp_path):
    path, options = files["full"][2], {**F32, "n_ctx": 64}
    prompt = tiny.prompt(30)
    fresh = FirstLlama(path, **options).create_completion(prompt, **GREEDY)
    source = {
        "plain": lambda: llama_cpp.Llama(str(path), verbose=False, **options),
        "file": lambda: FirstLlama(files["skip"][2], **options),
        "size": lambda: FirstLlama(path, **F32),
        "kind": lambda: FirstLlama(path, **{**options, "type_k": 1}),
    }[theirs]()
    source.set_cache(llama_cpp.LlamaDiskCache(str(tmp_path)))
    source.create_completion([*prompt, *tiny.prompt(40, 2)] if theirs == "size" else prompt, **GREEDY)
    llm, cache = FirstLlama(path, **options), llama_cpp.LlamaDiskCache(str(tmp_path))
    assert prompt in cache
    llm.set_cache(cache)
    found = llm.create_completion(prompt, **GREEDY)
    assert (found["choices"], found["first"]) == (fresh["choices"], fresh["first"])


@pytest.fixture(scope="module")
def pruned(tiny_model, tmp_path_factory):
    """(model file, masks, for each a file with only the layers that it keeps): the same forward, by other means."""
    import json

    from safetensors.torch import load_file, save_file

    folder, path = tiny_model("llama")
    masks, without = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 1]], bool), []
    for mask in masks:
        target = tmp_path_factory.mktemp("pruned")
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        tensors, kept = {}, np.flatnonzero(mask).tolist()
        for name, tensor in load_file(folder / "model.safetensors").items():
            parts = name.split(".")
            if "layers" in parts:
                layer = int(parts[2])
                if layer not in kept:
                    continue
                parts[2] = str(kept.index(layer))
            tensors[".".join(parts)] = tensor
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        config = json.loads((target / "config.json").read_text())
        config["num_hidden_layers"] = len(kept)
        config.pop("layer_types", None)
        (target / "config.json").write_text(json.dumps(config))
        without.append(tiny.gguf(target, target / "pruned.gguf"))
    return path, masks, without


@pytest.mark.parametrize("kv_unified", [False, True])
def test_masks_follow_every_memory_operation(kv_unified, pruned, tmp_path):
    """Random operations on the KV cache: each sequence does what a model without the layers of its mask does."""
    path, masks, without = pruned
    rng = np.random.default_rng(7)
    done, mixed = set(), []
    with contextlib.ExitStack() as stack:
        every = [stack.enter_context(opened(file, n_seq=3, kv_unified=kv_unified)) for file in (path, *without)]
        model = every[0]
        lengths, owner = [0, 0, 0], [0, 1, 2]  # owner: index of the mask
        for step in range(140):
            seq, other = (int(i) for i in rng.permutation(3)[:2])
            n = lengths[seq]
            name = rng.choice(["feed", "feed", "feed", "cp", "rm", "tail", "keep", "clear", "shift", "file", "blob"])
            if name == "feed" and n < 60:
                if n == 0:
                    owner[seq] = seq
                    model.set_mask(masks[seq], seq)
                tokens = tiny.prompt(int(rng.integers(1, 9)), step)
                found, *expected = (m.feed(tokens, n, seq) for m in every)
                assert np.abs(found - expected[owner[seq]]).max() < 1e-4
            elif name == "cp" and n:
                owner[other] = owner[seq]
                for m in every:
                    m.clear(other)
                    llama_cpp.llama_memory_seq_cp(m.memory, seq, other, -1, -1)
                    m.feed([5], n, other)  # llama.cpp copies with the next decode only, a state saved before lacks it
            elif name == "rm":
                for m in every:
                    llama_cpp.llama_memory_seq_rm(m.memory, seq, -1, -1)
            elif name == "tail" and n > 2:
                start = int(rng.integers(1, n))
                for m in every:
                    assert llama_cpp.llama_memory_seq_rm(m.memory, seq, start, -1)
            elif name == "keep":
                for m in every:
                    llama_cpp.llama_memory_seq_keep(m.memory, seq)
            elif name == "clear" and rng.random() < 0.3:
                for m in every:
                    llama_cpp.llama_memory_clear(m.memory, True)
            elif name == "shift" and n > 8:
                for m in every:
                    assert llama_cpp.llama_memory_seq_rm(m.memory, seq, 2, 5)
                    llama_cpp.llama_memory_seq_add(m.memory, seq, 5, -1, -3)
            elif name == "file" and n:
                owner[other] = owner[seq]
                for i, m in enumerate(every):
                    file = str(tmp_path / f"{i}.bin").encode()
                    ids, count = (ctypes.c_int32 * 1)(), ctypes.c_size_t(0)
                    assert llama_cpp.llama_state_seq_save_file(m.ctx, file, seq, ids, 0)
                    m.clear(other)
                    assert llama_cpp.llama_state_seq_load_file(m.ctx, file, other, ids, 1, ctypes.byref(count))
            elif name == "blob" and n:
                for m in every:
                    size = llama_cpp.llama_state_get_size(m.ctx)
                    blob = (ctypes.c_uint8 * size)()
                    wrote = llama_cpp.llama_state_get_data(m.ctx, blob, size)
                    llama_cpp.llama_memory_clear(m.memory, True)
                    assert llama_cpp.llama_state_set_data(m.ctx, blob, wrote) == wrote
            else:
                continue
            done.add(str(name))
            ends = [[llama_cpp.llama_memory_seq_pos_max(m.memory, i) + 1 for i in range(3)] for m in every]
            assert ends == ends[:1] * 4
            lengths = ends[0]
            for i in range(3):
                pinned = model.mask(i)
                assert (pinned is None) == (lengths[i] == 0)
                assert pinned is None or (pinned == masks[owner[i]]).all()
            mixed.append(name == "blob" and len({owner[i] for i in range(3) if lengths[i]}) > 1)
    assert done == {"feed", "cp", "rm", "tail", "keep", "clear", "shift", "file", "blob"} and sum(mixed) > 2


def test_a_sequence_moves_to_another_process_and_another_size(files, tmp_path):
    path, mask = files["full"][2], np.array([1, 0, 0, 1], bool)
    prompt, following = tiny.prompt(20), tiny.prompt(6, seed=9)
    ids, count = (ctypes.c_int32 * 1)(), ctypes.c_size_t(0)
    with opened(path) as model:
        model.set_mask(mask)
        model.feed(prompt)
        assert llama_cpp.llama_state_seq_save_file(model.ctx, str(tmp_path / "seq").encode(), 0, ids, 0)
        expected = np.concatenate([model.feed([t], 20 + i) for i, t in enumerate(following)])
    code = (
        "import ctypes, sys, numpy as np; from native_model import opened; import llama_cpp\n"
        "ids, count = (ctypes.c_int32 * 1)(), ctypes.c_size_t(0)\n"
        f"with opened({str(path)!r}, n_ctx=500, n_seq=4, kv_unified=True) as m:\n"
        f"    assert llama_cpp.llama_state_seq_load_file(m.ctx, {str(tmp_path / 'seq')!r}.encode(), 2, ids, 1, "
        "ctypes.byref(count))\n"
        f"    assert m.mask(2).tolist() == {mask.tolist()}\n"
        f"    rows = [m.feed([t], 20 + i, 2) for i, t in enumerate({following})]\n"
        f"    np.save({str(tmp_path / 'rows.npy')!r}, np.concatenate(rows))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "rows.npy") - expected).max() < 1e-4
    raw = (tmp_path / "seq").read_bytes()
    with opened(path, n_ctx=256) as small, opened(path, n_ctx=512) as model:
        model.feed(tiny.prompt(200))
        model.feed(tiny.prompt(100), 200)
        assert llama_cpp.llama_state_seq_save_file(model.ctx, str(tmp_path / "long").encode(), 0, ids, 0)
        assert not llama_cpp.llama_state_seq_load_file(small.ctx, str(tmp_path / "long").encode(), 0, ids, 1, count)
        model.clear()
        for cut in (0, 3, 11, 40, len(raw) // 2, len(raw) - 40):
            (tmp_path / "cut").write_bytes(raw[:cut])
            assert not llama_cpp.llama_state_seq_load_file(model.ctx, str(tmp_path / "cut").encode(), 0, ids, 1, count)
            assert model.mask() is None
            model.clear()
        model.set_mask(mask)
        again = [model.feed(prompt)[-1:], *(model.feed([t], 20 + i) for i, t in enumerate(following))]
        assert np.abs(np.concatenate(again)[1:] - expected).max() < 1e-4


def test_calls_from_several_threads_wait_and_streams_are_taken_over(files):
    path = files["full"][2]
    llm = FirstLlama(path, **F32)
    prompts = [tiny.prompt(10 + i, i) for i in range(6)]
    truth = [FirstLlama(path, **F32).create_completion(p, **GREEDY) for p in prompts]
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(llm.create_completion, p, **GREEDY) for p in prompts * 3]
        for call, expected in zip(calls, truth * 3, strict=True):
            found = call.result(120)
            assert (found["choices"], found["first"]) == (expected["choices"], expected["first"])

        def stream(prompt: list[int]) -> str | None:
            try:
                return "".join(c["choices"][0]["text"] for c in llm.create_completion(prompt, stream=True, **GREEDY))
            except RuntimeError as error:
                assert "took this object over" in str(error)
                return None

        texts = [pool.submit(stream, p).result(120) for p in prompts]
        assert texts == [t["choices"][0]["text"] for t in truth]
        mixed = [pool.submit(stream, p) for p in prompts * 2]
        for call, expected in zip(mixed, truth * 2, strict=True):
            assert call.result(120) in (None, expected["choices"][0]["text"])
    half = llm.create_completion(prompts[0], stream=True, **GREEDY)
    next(half)
    assert llm.create_completion(prompts[1], **GREEDY)["choices"] == truth[1]["choices"]
    with pytest.raises(RuntimeError, match="took this object over"):
        list(half)
    assert llm.create_completion(prompts[0], **GREEDY)["choices"] == truth[0]["choices"]


@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1]])
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_embeddings_are_the_parents_of_the_file_without_routers(prefill, mask, files, tiny_model):
    texts = ["the quick", "def f(x):", "a"]
    options = {**F32, "embedding": True}
    expected = llama_cpp.Llama(str(tiny_model("llama")[1]), verbose=False, **options).embed(texts)
    llm = FirstLlama(files[prefill][2], mask=mask, **options)
    before = llm("the quick", **GREEDY)
    assert before["first"]["skipped"]
    stream = llm("the quick", stream=True, **GREEDY)
    next(stream)
    assert llm.embed(texts) == expected and llm.embed(texts[0]) == expected[0]
    with pytest.raises(RuntimeError, match="took this object over"):
        list(stream)
    after = llm("the quick", **GREEDY)
    assert (after["choices"], after["first"]) == (before["choices"], before["first"])
    # Enough to compute some of them before the one that is refused.
    with pytest.raises(ValueError, match="exceed batch size"):
        llm.embed(["the quick"] * 200 + ["x " * 300], truncate=False)
    after = llm("the quick", **GREEDY)
    assert (after["choices"], after["first"]) == (before["choices"], before["first"])


def test_a_mask_is_for_the_call_that_names_it(files):
    """Also where another thread's call begins meanwhile, and where a chat handler makes the call in the middle."""
    llm = FirstLlama(files["full"][2], chat_format="chatml", **F32)
    prompt = tiny.prompt(10, 1)
    alone = llm.create_completion(prompt, **GREEDY)
    forced = {"skip_layers": [1, 2], "temperature": 0.0, "max_tokens": 4}
    for stream in (False, True):
        inside, others = threading.Event(), []

        def hold(_, scores, inside=inside, others=others):
            inside.set()
            time.sleep(0.2 * (not others))  # the other call comes while this one computes
            others.append(1)
            return scores

        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(
                lambda stream=stream, hold=hold: list(
                    llm.create_completion(prompt, stream=stream, logits_processor=[hold], **forced)
                )
            )
            assert inside.wait(60)
            found = llm.create_completion(prompt, **GREEDY)
            with contextlib.suppress(RuntimeError):  # the stream was taken over
                call.result(60)
        assert (found["choices"], found["first"]) == (alone["choices"], alone["first"])
    messages = [{"role": "user", "content": "the lazy dog"}]
    assert llm.create_chat_completion(messages, **forced)["first"]["skipped"] == [1, 2]
    chunks = list(llm.create_chat_completion(messages, stream=True, **forced))
    assert all(chunk["first"]["skipped"] == [1, 2] for chunk in chunks)


def test_a_stream_is_what_its_call_says(files):
    """Not what is so when its first chunk is asked for; whether it is a stream may also be said by place."""
    llm = FirstLlama(files["full"][2], **F32)
    messages = [{"role": "user", "content": "the lazy dog"}]
    calls = (
        lambda **kw: llm.create_completion("the quick", **kw, **GREEDY),
        lambda **kw: llm.create_chat_completion(messages, **kw, **GREEDY),
    )
    for call in calls:
        routed = call()
        assert routed["first"]["skipped"] not in ([], [2])
        with llm.forcing([1, 1, 0, 1]):
            forced, later = call(), call(stream=True)
        assert {str(chunk["first"]) for chunk in later} == {str(forced["first"])} != {str(routed["first"])}
        later = call(stream=True)
        with llm.forcing([1, 1, 0, 1]):
            assert next(later)["first"] == routed["first"]
        with pytest.raises(TypeError, match="'foo'"):
            call(stream=True, foo=1)
    whole = calls[1]()["choices"][0]["message"]["content"]
    stream = calls[1](stream=True)
    messages.append({"role": "assistant", "content": ""})
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in stream) == whole
    with pytest.raises(InputError, match="'role'"):
        llm.create_chat_completion([{"content": "x"}], stream=True)
    by_place = ("the quick", None, 8, 0.0, 0.95, 0.05, 1.0, None, False, [], 0.0, 0.0, 1.0, 40, True)
    text = "".join(chunk["choices"][0]["text"] for chunk in llm.create_completion(*by_place))
    assert text == calls[0]()["choices"][0]["text"]


@pytest.mark.parametrize("prefill", ["full", "skip"])
@pytest.mark.parametrize("second", [{}, {"skip_layers": [1, 2]}], ids=["routed", "forced"])
def test_after_an_interrupted_prompt_everything_is_as_in_a_fresh_object(second, prefill, tiny_model, tmp_path):
    """Ctrl-C or a failed decode between two batches of a prompt; the rest must not pass for the one before."""
    from first_convert.convert import convert

    folder, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "r", folder, seed=3, prefill=prefill, window=40)
    convert(None, base_gguf=base, first=recipe, outfile=tmp_path / "m.gguf")
    path, small = tmp_path / "m.gguf", {**F32, "n_batch": 16}
    changed = False
    for seed in range(6):
        shared = tiny.prompt(30, seed)
        first, other = shared[:20] + tiny.prompt(30, 50 + seed), shared + tiny.prompt(60, 90 + seed)
        want = FirstLlama(path, **small).create_completion(first, **GREEDY)
        changed |= want["first"]["skipped"] not in ([], [1, 2])
        for at in (1, 2, 3):
            llm = FirstLlama(path, **small)
            llm.create_completion(first, **GREEDY)
            decode, calls = llm._ctx.decode, itertools.count(1)

            def interrupted(batch, decode=decode, calls=calls, at=at):
                if next(calls) == at:
                    raise KeyboardInterrupt
                return decode(batch)

            llm._ctx.decode = interrupted
            with pytest.raises(KeyboardInterrupt):
                llm.create_completion(other, **second, **GREEDY)
            llm._ctx.decode = decode
            found = llm.create_completion(first, **GREEDY)
            assert (found["choices"], found["first"]) == (want["choices"], want["first"]), (seed, at)
    assert changed


def test_a_seed_means_the_same_everywhere(files):
    path = files["full"][2]
    llm = FirstLlama(path, **F32)
    options = {"max_tokens": 12, "temperature": 1.0}

    def text(model: FirstLlama, seed: int | None) -> tuple[str, list[int]]:
        result = model.create_completion("the quick", seed=seed, **options)
        return result["choices"][0]["text"], result["first"]["skipped"]

    first = text(llm, 7)
    assert text(llm, 7) == first
    llm.create_completion(tiny.prompt(30), seed=3, **options)
    assert text(llm, 7) == first
    assert text(FirstLlama(path, **F32), 7) == first
    drawn = [text(FirstLlama(path, **F32), None) for _ in range(4)]
    assert len({t for t, _ in drawn}) > 1
    assert all(skipped == first[1] for _, skipped in drawn)


def test_calls_without_a_seed_draw_the_parents(tiny_model):
    path = tiny_model("llama")[1]
    parent = llama_cpp.Llama(str(path), seed=42, verbose=False, **F32)
    llm = FirstLlama(path, seed=np.int64(42), **F32)
    for seed in (None, None, 5, None):
        # Where a character has several tokens, the parent's texts can be longer.
        parent("the quick", seed=seed, max_tokens=1)
        llm("the quick", seed=None if seed is None else np.int64(seed), max_tokens=1)
        assert llm._seed == parent._seed


def test_the_end_of_the_context_is_an_error_or_length(files, tiny_model, tmp_path):
    llm = FirstLlama(files["full"][2], **{**F32, "n_ctx": 64})
    options = {"temperature": 0.0, "logit_bias": {llm.token_eos(): -100.0}}
    for n in (62, 63, 64, 65):
        for limit in (1, None, 500):
            for stream in (False, True):
                call = lambda n=n, limit=limit, stream=stream: llm.create_completion(  # noqa: E731
                    tiny.prompt(n), max_tokens=limit, stream=stream, **options
                )
                if n >= 64:
                    with pytest.raises(InputError, match=f"{n} tokens, the context holds 64"):
                        list(call())
                    continue
                last = list(call())[-1] if stream else call()
                assert last["choices"][0]["finish_reason"] == "length"
                if not stream:
                    assert last["usage"]["completion_tokens"] == (1 if limit == 1 else 64 - n)
    # A long training context is no reason to take its memory.
    folder = tiny.make("llama", tmp_path / "long", max_position_embeddings=131072)
    path = tiny.gguf(folder, tmp_path / "long.gguf")
    assert FirstLlama(path).n_ctx() == 512
    with pytest.raises(InputError, match=r"long\.gguf: .+"):
        FirstLlama(path, n_ctx=2**31 - 256)


@pytest.mark.parametrize("n_ctx", [100, 128])
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_drafts_change_no_answer_up_to_the_end_of_the_context(prefill, n_ctx, files):
    path, options = files[prefill][2], {**F32, "n_ctx": n_ctx, "n_batch": 32}
    prompt, call = tiny.prompt(20), {"temperature": 0.0, "max_tokens": None}
    plain = FirstLlama(path, **options)
    call["logit_bias"] = {plain.token_eos(): -100.0}
    truth = plain.create_completion(prompt, **call)
    read = plain.input_ids[: plain.n_tokens].tolist()
    assert truth["choices"][0]["finish_reason"] == "length" and len(read) == n_ctx - 1

    class Drafts(llama_cpp.llama_speculative.LlamaDraftModel):
        """The answer itself, every fifth token wrong."""

        def __call__(self, ids, /, **kwargs):
            following = [token if i % 5 else 7 for i, token in enumerate([*read, *[7] * 20])]
            return np.array(following[len(ids) : len(ids) + 10], np.intc)

    drafted = FirstLlama(path, draft_model=Drafts(), **options)
    for _ in range(2):
        found = drafted.create_completion(prompt, **call)
        assert [found[key] for key in ("choices", "usage", "first")] == [
            truth[key] for key in ("choices", "usage", "first")
        ]


def test_closing_frees_and_says_so(files):
    path = files["full"][2]
    llm = FirstLlama(path, **F32)
    stream = llm("the quick", stream=True, **GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for call in (
        lambda: llm("the quick"),
        lambda: llm.create_chat_completion([{"role": "user", "content": "x"}]),
        lambda: llm.tokenize(b"x"),
        lambda: llm.eval([5]),
        lambda: next(llm.generate([5])),
        lambda: llm.save_state(),
        lambda: list(stream),
        lambda: llm.calibration(),
        lambda: setattr(llm, "threshold", 0.5),
        lambda: llm.is_eog(2),
        lambda: llm.logits_of(llm.n_tokens - 1),
        lambda: llm.sample(),
        lambda: llm.embed("x"),
        lambda: llm.n_ctx(),
        lambda: llm.n_embd(),
        lambda: llm.pooling_type(),
        lambda: llm.tokenizer().encode("x"),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


MANY = """
import gc
import sys
import heap
from pyfirst import FirstLlama

sizes = []
for i in range(120):
    llm = FirstLlama(sys.argv[1], n_ctx=128)
    llm.create_completion([5, 6, 7, 8], max_tokens=4)
    llm.close()
    gc.collect()  # what is left to Python's collector is not lost
    sizes.append(heap.in_use())
print(sizes[-1] - sizes[20])
"""


def test_closing_frees_the_memory(files):
    """In a process of its own: in ours the tests before leave memory that comes and goes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MANY, str(files["full"][2])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2e6  # a context alone takes 1 MB; jinja2 keeps half of one of templates it has seen


@pytest.mark.parametrize(
    "code",
    [
        "llm = FirstLlama(path); llm('the quick', max_tokens=3); sys.exit(3)",
        "llm = FirstLlama(path); s = llm('the quick', max_tokens=9, stream=True); next(s); sys.exit(3)",
        "try: FirstLlama(path + 'x')\nexcept ValueError: sys.exit(3)",
        "try: FirstLlama(path, mask=[1])\nexcept ValueError: sys.exit(3)",
    ],
)
def test_the_interpreter_ends_quietly(code, files):
    text = f"import sys; from pyfirst import FirstLlama\npath = {str(files['full'][2])!r}\n{code}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_threads_are_those_we_may_use(files):
    code = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); from pyfirst import FirstLlama\n"
        f"llm = FirstLlama({str(files['full'][2])!r})\nprint(llm.n_threads, llm.n_threads_batch)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"]
    prompt = tiny.prompt(20)
    assert tokens_of(FirstLlama(files["full"][2], n_threads=7, **F32), prompt, 4) == tokens_of(
        FirstLlama(files["full"][2], n_threads=1, **F32), prompt, 4
    )


def test_the_library_is_found_beside_its_parts(tmp_path):
    """A copy elsewhere loads with its own ggml, from any folder and without LD_LIBRARY_PATH."""
    import shutil

    shutil.copytree(native.lib_dir(), tmp_path / "moved")
    code = (
        "import pyfirst.native, llama_cpp; print(llama_cpp.llama_cpp._lib._name)\n"
        "print([line.split()[-1] for line in open('/proc/self/maps') if 'ggml' in line])"
    )
    env = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    env |= {"LLAMA_CPP_LIB_PATH": str(tmp_path / "moved"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, maps = done.stdout.splitlines()
    assert name.startswith(str(tmp_path / "moved")) and str(native.lib_dir()) not in maps


def test_wrong_input_is_value_error(files, tmp_path):
    path = files["full"][2]
    llm = FirstLlama(path, **{**F32, "n_ctx": 64})
    for call in (
        lambda: llm(""),
        lambda: llm([]),
        lambda: llm.create_chat_completion([]),
        lambda: llm("the quick " * 200),
        lambda: llm(tiny.prompt(65)),
        lambda: list(llm.generate([])),
        lambda: list(llm.generate(tiny.prompt(65))),
        lambda: llm("x", mask=[1, 0]),
        lambda: llm("x", skip_layers=[4]),
        lambda: llm("x", mask=[1, 1, 1, 1], skip_layers=[1]),
        lambda: FirstLlama(path, prefill="half"),
        lambda: FirstLlama(path, threshold=float("nan")),
        lambda: FirstLlama(path, skip=1.5),
        lambda: FirstLlama(path, skip=0.2, threshold=0.5),
        lambda: FirstLlama(path, mask=[1, 1]),
        lambda: FirstLlama(path, mask=[0.2, 0.9, 0.1, 0.8]),
        lambda: FirstLlama(path, mask=["0", "1", "0", "1"]),
        lambda: FirstLlama(path, mask="1010"),
        lambda: FirstLlama(path, skip_layers=2),
        lambda: FirstLlama(path, skip_layers="2"),
        lambda: FirstLlama(path, skip_layers=[1.0]),
        lambda: FirstLlama(path, skip_layers=[True, False, True, True]),
        lambda: FirstLlama(path, threshold="0.5"),
        lambda: FirstLlama(path, skip="0.5"),
        lambda: setattr(llm, "threshold", None),
        lambda: setattr(llm, "threshold", "0.5"),
        lambda: FirstLlama(tmp_path / "absent.gguf"),
        lambda: FirstLlama(tmp_path),
    ):
        with pytest.raises(ValueError, match=r".+"):
            call()
    with pytest.raises(TypeError, match="'treshold'"):
        FirstLlama(path, treshold=0.2)
    assert FirstLlama(path, mask=np.array([0.0, 1, 1, 0]), n_parts=-1, f16_kv=True, **F32)._forced is not None
    result = llm("the quick", max_tokens=None, temperature=0, logit_bias={llm.token_eos(): -100.0})
    assert result["choices"][0]["finish_reason"] == "length" and result["choices"][0]["text"]
    (tmp_path / "text.gguf").write_text("hello there")
    with pytest.raises(InputError, match=r"text\.gguf: .*magic"):
        FirstLlama(tmp_path / "text.gguf")


def test_an_adapter_that_does_not_load_is_told_and_not_fatal(files, tmp_path):
    """In a process of its own, which a null pointer would end."""
    import gguf

    path = files["full"][2]

    def adapter(name: str, n_in: int) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        weight = np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)
        writer.add_tensor("blk.0.ffn_up.weight.lora_a", np.ones((4, n_in), np.float32))
        writer.add_tensor("blk.0.ffn_up.weight.lora_b", weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    (tmp_path / "text.gguf").write_text("hello there")
    wrong = {tmp_path / "absent.gguf": "no such file", tmp_path / "text.gguf": "magic", path: "general.type"}
    wrong[adapter("narrow.gguf", 32)] = "incorrect shape"
    code = (
        "import sys; from pyfirst import FirstLlama\n"
        "for lora in sys.argv[2:]:\n"
        "    try: FirstLlama(sys.argv[1], n_ctx=256, lora_path=lora)\n"
        "    except ValueError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, path, *wrong], env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(wrong), done.stderr
    for line, (file, reason) in zip(lines, wrong.items(), strict=True):
        assert line.startswith(f"{file}: ") and reason in line
    good = adapter("good.gguf", tiny.WIDTH)
    theirs = llama_cpp.Llama(str(path), lora_path=str(good), verbose=False, **F32)
    mine = FirstLlama(path, lora_path=good, routing=False, **F32)
    prompt = tiny.prompt(20)
    assert (
        tokens_of(mine, prompt)
        == tokens_of(theirs, prompt)
        != tokens_of(FirstLlama(path, routing=False, **F32), prompt)
    )
    plain = FirstLlama(path, routing=False, **F32)
    with pytest.raises(InputError, match="LoRA"):
        plain.load_state(mine.save_state())


def test_routers_that_do_not_fit_are_a_load_error(tiny_model, tmp_path):
    """Keys whose sizes are wrong must not load as routers of zero."""
    import gguf

    source = gguf.GGUFReader(tiny_model("llama")[1])

    def write(name, **changed):
        values = {
            "block_count": 4,
            "embedding_length": 64,
            "weight": [0.0] * 256,
            "bias": [0.0] * 4,
            "version": 1,
            **changed,
        }
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for field in source.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub)
        for key in ("version", "block_count", "embedding_length"):
            if values[key] is not None:
                writer.add_uint32(f"first.{key}", values[key])
        for key in ("weight", "bias"):
            if values[key] is not None:
                writer.add_array(f"first.router.{key}", values[key])
        for tensor in source.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    FirstLlama(write("good.gguf"), **F32)
    for expected, changed in (
        ("6.*4 layers", {"block_count": 6}),
        ("32.*width 64", {"embedding_length": 32}),
        ("first.router.weight", {"weight": [0.0] * 255}),
        ("first.router.bias", {"bias": None}),
        ("NaN", {"bias": [0.0, float("nan"), 0.0, 0.0]}),
        ("first.version", {"version": 9}),
        ("first.version", {"version": None}),
    ):
        with pytest.raises(InputError, match=expected):
            FirstLlama(write("bad.gguf", **changed), **F32)


def test_importing_llama_cpp_first_is_explained(tmp_path):
    """A stock libllama in the way gives one ImportError that names the file and the symbol."""
    code = "import llama_cpp\nimport pyfirst.native\n"
    from test_patch import STOCK

    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(STOCK), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert (
        "libllama" in result.stderr and "llama_first_" in result.stderr and "unset LLAMA_CPP_LIB_PATH" in result.stderr
    )
    env["LLAMA_CPP_LIB_PATH"] = str(native.lib_dir())
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_a_file_without_a_vocabulary_is_told_and_not_fatal(tiny_model, tmp_path):
    from first_convert.ggufio import Entry, Gguf, rewrite

    path = tmp_path / "none.gguf"
    added = [Entry("tokenizer.ggml.model", "STRING", "no_vocab"), Entry("llama.vocab_size", "UINT32", tiny.VOCAB)]
    rewrite(Gguf(tiny_model("llama")[1]), path, added, lambda key: "tokenizer." not in key and "vocab" not in key)
    llm = FirstLlama(path, **F32)
    assert next(llm.generate([5, 6, 7], temp=0.0)) in range(tiny.VOCAB)
    for prompt in ("the fox", [5, 6, 7]):
        with pytest.raises(InputError, match="no vocabulary in this file"):
            llm.create_completion(prompt, **GREEDY)
    with pytest.raises(InputError, match="no vocabulary in this file"):
        FirstBatch(path)
