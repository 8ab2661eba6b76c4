"""FirstLlama against fresh objects, its parent's behaviour and a plain torch forward."""

from __future__ import annotations

import pickle
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
import tiny

from pyfirst import FirstLlama, InputError, native

F32 = {"type_k": 0, "type_v": 0, "n_ctx": 256}
GREEDY = {"temperature": 0.0, "max_tokens": 8}


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    """prefill -> (HF folder, recipe, GGUF whose routers decide by the prompt)."""
    from first_convert.convert import convert

    root = tmp_path_factory.mktemp("llama")
    folder, base = tiny_model("llama")
    made = {}
    for prefill in ("full", "skip"):
        recipe = tiny.recipe(
            root / prefill,
            folder,
            seed=3,
            prefill=prefill,
            calibration={"threshold": [0.3, 0.5, 0.7], "kept": [1.0, 0.6, 0.2]},
        )
        convert(None, base_gguf=base, first=recipe, outfile=root / f"{prefill}.gguf")
        made[prefill] = (folder, recipe, root / f"{prefill}.gguf")
    return made


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


def test_the_default_seed_differs_and_a_given_one_does_not(files):
    path = files["full"][2]

    def answer(**kwargs) -> str:
        return FirstLlama(path, **F32, **kwargs)("the quick", max_tokens=12, temperature=1.0)["choices"][0]["text"]

    assert len({answer() for _ in range(4)}) > 1
    assert answer(seed=5) == answer(seed=5)


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
    plain = llama_cpp.Llama(str(path), verbose=False, **F32)
    plain.eval(prompts[0])
    with pytest.raises((ValueError, RuntimeError)):
        other.load_state(plain.save_state())
    short = pickle.loads(pickle.dumps(states[0]))
    short.llama_state, short.llama_state_size = short.llama_state[:-9], short.llama_state_size - 9
    with pytest.raises((ValueError, RuntimeError)):
        other.load_state(short)
    assert tokens_of(other, prompts[0], 16) == truth[0]


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
        lambda: FirstLlama(tmp_path / "absent.gguf"),
        lambda: FirstLlama(tmp_path),
    ):
        with pytest.raises(ValueError, match=r".+"):
            call()
    result = llm("the quick", max_tokens=None, temperature=0, logit_bias={llm.token_eos(): -100.0})
    assert result["choices"][0]["finish_reason"] == "length" and result["choices"][0]["text"]
    (tmp_path / "text.gguf").write_text("hello there")
    with pytest.raises(InputError, match=r"text\.gguf: .*magic"):
        FirstLlama(tmp_path / "text.gguf")


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
    import os

    from test_patch import STOCK

    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(STOCK), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert (
        "libllama" in result.stderr and "llama_first_" in result.stderr and "unset LLAMA_CPP_LIB_PATH" in result.stderr
    )
    env["LLAMA_CPP_LIB_PATH"] = str(native.lib_dir())
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
