"""FirstBatch: each sequence equals its solo run, whatever its neighbours do."""

from __future__ import annotations

import _thread
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import heap
import numpy as np
import pytest
import tiny

from pyfirst import FirstBatch, FirstLlama, InputError
from pyfirst.batch import Request
from pyfirst.cpu import usable_cpus

import llama_cpp  # isort: skip  (after pyfirst, which points it at our library)

F32 = {"type_k": 0, "type_v": 0}
MASKS = [[1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1], None]


def solo(path, prompt: list[int], n: int, mask=None, **kwargs) -> tuple[str, dict]:
    """Text and "first" entry of one prompt on an object of its own."""
    with FirstBatch(path, n_parallel=1, **F32, **kwargs) as batch:
        result = batch.generate([prompt], max_tokens=n, masks=[mask], temperature=0.0)[0]
    return result["choices"][0]["text"], result["first"]


def texts(results) -> list[str]:
    return [result["choices"][0]["text"] for result in results]


SETTINGS = [{}, {"threshold": 0.4}, {"skip": 0.2}, {"prefill": "full"}, {"prefill": "skip"}]
SETTINGS += [{"routing": False, "prefill": "full"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_solo_run_equals_first_llama(prefill, settings, files):
    _, _, path = files[prefill]
    llm = FirstLlama(path, n_ctx=256, n_threads=1, **F32, **settings)
    changed = False
    for seed in range(4):
        prompt = tiny.prompt(12 + seed, seed)
        found = solo(path, prompt, 12, n_threads=1, **settings)
        changed |= found != solo(path, prompt, 12, n_threads=1)
        tokens = list(itertools.islice(llm.generate(prompt, temp=0.0), 12))
        eos = next((i for i, t in enumerate(tokens) if t == llm.token_eos()), len(tokens))
        assert found[0] == llm.detokenize(tokens[:eos]).decode("utf-8", "ignore")
        assert llm.routing is not None and found[1] == llm.routing.report()
    assert changed == (settings not in ({}, {"prefill": prefill}))


@pytest.mark.parametrize("kv_unified", [False, True])
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_every_order_of_mixed_masks_equals_solo(prefill, kv_unified, files):
    path = files[prefill][2]
    prompts = [tiny.prompt(5 + 7 * i, seed=i) for i in range(4)]
    counts = [3, 24, 16, 20]  # one finishes early
    alone = [solo(path, p, n, m) for p, n, m in zip(prompts, counts, MASKS, strict=True)]
    with FirstBatch(path, n_parallel=3, kv_unified=kv_unified, **F32) as batch:  # the fourth joins late
        for order in itertools.permutations(range(4)):
            results = batch.generate(
                [prompts[i] for i in order],
                max_tokens=[counts[i] for i in order],
                masks=[MASKS[i] for i in order],
                temperature=0.0,
            )
            assert texts(results) == [alone[i][0] for i in order]
            assert [r["first"] for r in results] == [alone[i][1] for i in order]


def test_routed_prompts_decide_for_themselves(files):
    folder, recipe, path = files["full"]
    prompts = [tiny.prompt(9 + 3 * i, seed=i) for i in range(8)]
    with FirstBatch(path, n_parallel=4, **F32) as batch:
        results = batch.generate(prompts, max_tokens=8, temperature=0.0)
    seen = set()
    for prompt, result in zip(prompts, results, strict=True):
        mask, _ = tiny.decide(folder, recipe, prompt)
        assert result["first"]["skipped"] == np.flatnonzero(~mask).tolist()
        assert result["choices"][0]["text"] == solo(path, prompt, 8)[0]
        seen.add(mask.tobytes())
    assert len(seen) > 1


def first_logprobs(results) -> list[dict[str, float]]:
    """The likeliest first tokens of each answer; equal to the last bit where the prompts were read alike."""
    return [result["choices"][0]["logprobs"]["top_logprobs"][0] for result in results]


@pytest.mark.parametrize("n_batch", [5, 512])
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_prompt_is_read_to_the_last_bit_as_alone(prefill, n_batch, files):
    """With the cache in float16, beside prompts of other lengths, in pieces, and again where it was read before."""
    asked = {"max_tokens": 1, "temperature": 0.0, "logprobs": 20}
    prompts = [tiny.prompt(n, n) for n in (31, 1, 6, 2, 7, 24, 3, 36)]
    with FirstBatch(files[prefill][2], n_parallel=1) as batch:
        alone = [first_logprobs(batch.generate([prompt], **asked))[0] for prompt in prompts]
    with FirstBatch(files[prefill][2], n_parallel=4, n_batch=n_batch) as batch:
        assert first_logprobs(batch.generate(prompts, **asked)) == alone
        assert first_logprobs(batch.generate(prompts[-1:], **asked)) == alone[-1:]


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_prompt_that_is_given_up_ends_in_its_middle(prefill, files, monkeypatch):
    """Its place is free at once, and what others said and what is asked next is as ever."""
    path = files[prefill][2]
    prompts = [tiny.prompt(n, n) for n in (9, 90, 91)]
    alone = [solo(path, prompt, 20)[0] for prompt in prompts]
    with FirstBatch(path, n_parallel=2, n_ctx=128, **F32) as batch:
        talking = batch.submit(Request(prompts[0], max_tokens=20, temperature=0.0))
        said = "".join(update.text for update in batch.step())
        decode, statuses = FirstBatch._decode, []

        def interrupted(self):
            batch.interrupt(handle)
            try:
                decode(self)
                statuses.append("done")
            except Exception as error:
                statuses.append(type(error).__name__)
                raise

        handle = batch.submit(Request(prompts[1], max_tokens=20, temperature=0.0))
        monkeypatch.setattr(FirstBatch, "_decode", interrupted)
        said += "".join(update.text for update in batch.step())
        monkeypatch.undo()
        assert statuses == ["done", "_Interrupted"] and batch.n_active == 1 and batch.routing(handle) is None
        batch.cancel(handle)
        for prompt, expected in zip(prompts[1:], alone[1:], strict=True):
            batch.submit(Request(prompt, max_tokens=20, temperature=0.0))
            found = {}
            while batch.n_active or batch.n_waiting:
                for update in batch.step():
                    found[update.request] = found.get(update.request, "") + update.text
            said += found.pop(talking, "")
            assert list(found.values()) == [expected]
        assert said == alone[0]


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_first_come_first_read(prefill, files):
    """While short answers follow each other as fast as places get free."""
    with FirstBatch(files[prefill][2], n_parallel=4, n_batch=64) as batch:
        talking = batch.submit(Request(tiny.prompt(8, 1), max_tokens=60, temperature=1.0, seed=6))
        batch.step()
        order, said, steps, n = [], 0, 0, 0
        while len(order) < 40:
            while batch.n_waiting < 4:
                batch.submit(Request(tiny.prompt(100, n), max_tokens=1))
                n += 1
            updates = batch.step()
            steps += 1
            order += [update.request for update in updates if update.request != talking]
            said += talking in [update.request for update in updates]
    assert order == sorted(order) and said == min(steps, 59)


def test_a_place_is_taken_as_soon_as_it_is_left(files):
    """Five answers pass through one of two places while a long one holds the other."""
    with FirstBatch(files["full"][2], n_parallel=2, n_threads=1, **F32) as batch:
        long = batch.submit(Request(tiny.prompt(8, 1), max_tokens=60, temperature=1.0, seed=6))
        short = [batch.submit(Request(tiny.prompt(8, 2 + i), max_tokens=1)) for i in range(5)]
        ended = []
        while batch.n_active or batch.n_waiting:
            ended += [(update.request, update.n_generated) for update in batch.step() if update.finish_reason]
    assert ended == [*((handle, 1) for handle in short), (long, 60)]


@pytest.fixture
def computed(monkeypatch):
    """Counts the tokens that batches compute."""
    counts: list[int] = []
    decode = FirstBatch._decode

    def count(self):
        counts.append(self._batch.n_tokens)
        decode(self)

    monkeypatch.setattr(FirstBatch, "_decode", count)
    return counts


def test_all_that_decode_share_one_call_of_llama(files, computed):
    with FirstBatch(files["full"][2], n_parallel=4, n_threads=1, **F32) as batch:
        for seed in range(4):
            batch.submit(Request(tiny.prompt(8, seed), max_tokens=12, temperature=0.0))
        while batch.n_active or batch.n_waiting:
            batch.step()
    assert computed == [8] * 4 + [4] * 11


def answers(results) -> list[tuple[str, dict]]:
    return [(r["choices"][0]["text"], r["first"]) for r in results]


@pytest.mark.parametrize("n_batch", [8, 32, 512])
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_no_decision_depends_on_the_batch_size(prefill, n_batch, files):
    """Prompts around and beyond n_batch, and some whose mask hangs on the last token."""
    folder, recipe, path = files[prefill]
    prompts = [tiny.prompt(n, n) for n in (1, 31, 32, 33, 100)]
    stem = tiny.prompt(3, 3)
    last = {tiny.decide(folder, recipe, [*stem, t])[0].tobytes(): [*stem, t] for t in range(3, 60, 4)}
    assert len(last) > 1
    prompts += list(last.values())
    with FirstBatch(path, n_parallel=3, n_batch=n_batch, **F32) as batch:
        results = batch.generate(prompts, max_tokens=4, temperature=0.0)
    for prompt, result in zip(prompts, results, strict=True):
        mask, _ = tiny.decide(folder, recipe, prompt)
        assert result["first"]["skipped"] == np.flatnonzero(~mask).tolist()
        assert (result["choices"][0]["text"], result["first"]) == solo(path, prompt, 4)


@pytest.mark.parametrize("kv_unified", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["routed", "forced"])
def test_a_shared_prefix_is_read_once(masked, kv_unified, files, computed):
    """Also where others begin differently, between calls, and after the first of them has long gone."""
    path = files["full"][2]
    prefix, other = tiny.prompt(60, 5), tiny.prompt(20, 99)
    prompts = [prefix + tiny.prompt(6, seed=10 + i) for i in range(4)]
    prompts.insert(1, other)
    masks = [[[1, 0, 1, 1], [1, 1, 0, 1], None, [1, 1, 1, 0], [1, 0, 0, 1]][i] if masked else None for i in range(5)]
    if masked:
        masks[2] = [1, 1, 1, 1]
    alone = [solo(path, p, 8, m) for p, m in zip(prompts, masks, strict=True)]
    computed.clear()
    with FirstBatch(path, n_parallel=3, kv_unified=kv_unified, **F32) as batch:
        assert answers(batch.generate(prompts, max_tokens=8, masks=masks, temperature=0.0)) == alone
        assert sum(computed) <= 60 + 4 * 6 + 20 + 5 * 8
        computed.clear()
        assert answers(batch.generate(prompts[::-1], max_tokens=8, masks=masks[::-1], temperature=0.0)) == alone[::-1]
        assert sum(computed) <= 4 * 6 + 20 + 5 * 8


@pytest.fixture(scope="module")
def windowed(tiny_model, tmp_path_factory):
    """A file whose first 24 tokens decide, for the rest of the prompt too."""
    from first_convert.convert import convert

    root = tmp_path_factory.mktemp("windowed")
    folder, base = tiny_model("llama")
    recipe = tiny.recipe(root / "r", folder, seed=3, prefill="skip", window=24)
    convert(None, base_gguf=base, first=recipe, outfile=root / "m.gguf")
    return root / "m.gguf"


def test_in_skip_a_prefix_is_shared_where_the_mask_is_the_same(windowed, computed):
    """The prompt itself obeys the mask, so the same tokens must have decided."""
    prefix = tiny.prompt(40, 5)
    prompts = [prefix + tiny.prompt(6, seed=10 + i) for i in range(3)]
    prompts += [prefix[:20] + tiny.prompt(26, seed=50), prefix + tiny.prompt(6, seed=10)]
    for masks in (None, [[1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], None, [1, 1, 0, 1]]):
        forced = masks or [None] * 5
        alone = [solo(windowed, p, 8, m) for p, m in zip(prompts, forced, strict=True)]
        computed.clear()
        with FirstBatch(windowed, n_parallel=3, **F32) as batch:
            lists = iter(prompts), masks and iter(masks)
            assert answers(batch.generate(lists[0], max_tokens=8, masks=lists[1], temperature=0.0)) == alone
        assert sum(computed) < 5 * (46 + 8) - 2 * 30


def test_what_lies_there_longest_makes_room(files, computed):
    prefix = tiny.prompt(40, 5)
    with FirstBatch(files["full"][2], n_parallel=2, **F32) as batch:
        for i, beginning in enumerate([prefix, [], prefix, [], prefix]):
            computed.clear()
            batch.generate([beginning + tiny.prompt(44 - len(beginning), 10 + i)], max_tokens=1)
            assert (sum(computed) < 40) == (i in (2, 4))


def test_in_skip_another_threshold_shares_no_prefix(windowed):
    prompts = [tiny.prompt(40, 5) + tiny.prompt(6, seed=10 + i) for i in range(3)]
    thresholds = [0.45, 0.55, 0.45]
    alone = [solo(windowed, p, 8, threshold=t) for p, t in zip(prompts, thresholds, strict=True)]
    assert alone[0][1]["skipped"] != alone[1][1]["skipped"]
    with FirstBatch(windowed, n_parallel=1, **F32) as batch:
        assert answers(batch.generate(prompts, max_tokens=8, threshold=thresholds, temperature=0.0)) == alone


def test_in_skip_a_mask_is_reported_that_came_with_a_prefix_still_being_read(windowed):
    """The decision falls long before a prompt of many batches has been read, and stays when it is cancelled."""
    prefix = tiny.prompt(64, 5)
    long, short = prefix + tiny.prompt(150, 6), prefix + tiny.prompt(20, 7)
    alone = [solo(windowed, p, 4) for p in (long, short)]
    assert alone[0][1]["skipped"]
    with FirstBatch(windowed, n_parallel=3, n_batch=24, **F32) as batch:
        assert answers(batch.generate([long, short], max_tokens=4, temperature=0.0)) == alone
    for steps in range(1, 6):
        with FirstBatch(windowed, n_parallel=3, n_batch=24, **F32) as batch:
            handle = batch.submit(Request(long, temperature=0.0))
            for _ in range(steps):
                assert batch.step() == []
            batch.cancel(handle)
            assert answers(batch.generate([short], max_tokens=4, temperature=0.0)) == alone[1:]


def test_random_prompts_that_share_beginnings_equal_solo(files):
    """Random lengths, branches, masks and thresholds; sequences are reused all the time."""
    for prefill in ("full", "skip"):
        path = files[prefill][2]
        rng = np.random.default_rng(4)
        stems = [tiny.prompt(40, 1), tiny.prompt(40, 2)]
        prompts, masks, counts = [], [], []
        for _ in range(24):
            stem = stems[rng.integers(2)][: rng.integers(10, 41)]
            prompts.append(stem + tiny.prompt(int(rng.integers(1, 12)), seed=int(rng.integers(6))))
            masks.append([None, [1, 0, 1, 1], None, [0, 1, 1, 0]][rng.integers(4)])
            counts.append(int(rng.integers(1, 14)))
        alone = [solo(path, p, n, m) for p, n, m in zip(prompts, counts, masks, strict=True)]
        with FirstBatch(path, n_parallel=3, n_batch=32, **F32) as batch:
            for _ in range(2):
                found = batch.generate(prompts, max_tokens=counts, masks=masks, temperature=0.0)
                assert answers(found) == alone


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_neighbours_change_no_score(prefill, files):
    """Alone, beside longer neighbours, in any place: the same mask, and scores within rounding."""
    folder, recipe, path = files[prefill]
    prompt = [*tiny.prompt(14, 1), 2]  # ends in the token that ends texts
    mask, scores = tiny.decide(folder, recipe, prompt)
    for place in range(3):
        with FirstBatch(path, n_parallel=3, **F32) as batch:
            others = [Request(tiny.prompt(n, n), max_tokens=4) for n in (30, 61)]
            others.insert(place, Request(prompt, max_tokens=4))
            handles = [batch.submit(request) for request in others]
            while batch.routing(handles[place]) is None:
                batch.step()
            routing = batch.routing(handles[place])
        assert routing is not None and (routing.mask == mask).all()
        np.testing.assert_allclose(routing.scores, scores, atol=1e-5)


def test_several_streams_and_threads_share_the_batch(files):
    path = files["full"][2]
    prompts = [tiny.prompt(10, i) for i in range(12)]
    alone = [solo(path, p, 10)[0] for p in prompts]
    with FirstBatch(path, n_parallel=3, **F32) as batch:
        streams = [batch.generate([p], max_tokens=10, temperature=0.0, stream=True) for p in prompts]
        found = [""] * 12
        for parts in itertools.zip_longest(*streams):
            for i, part in enumerate(parts):
                found[i] += part[1]["choices"][0]["text"] if part else ""
        assert found == alone
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(batch.generate, [p], max_tokens=10, temperature=0.0) for p in prompts]
            assert [texts(call.result(60))[0] for call in calls] == alone
        assert batch.n_active == batch.n_waiting == 0
        abandoned = batch.generate(prompts, max_tokens=10, stream=True)
        del abandoned  # never begun
        assert batch.n_waiting == 0


def test_generate_keeps_what_belongs_to_step(files):
    """Whoever computes, the updates of a submitted request reach step(), those of a cancelled one nobody."""
    path = files["full"][2]
    prompts = [tiny.prompt(10, i) for i in range(4)]
    alone = [solo(path, p, 10)[0] for p in prompts]
    with FirstBatch(path, n_parallel=4, **F32) as batch:
        mine = [batch.submit(Request(p, max_tokens=10, temperature=0.0)) for p in prompts[:3]]
        assert texts(batch.generate(prompts[3:], max_tokens=10, temperature=0.0)) == alone[3:]
        batch.cancel(mine[1])
        found = dict.fromkeys(mine, "")
        for _ in range(40):
            for update in batch.step():
                found[update.request] += update.text
        assert [found[mine[0]], found[mine[1]], found[mine[2]]] == [alone[0], "", alone[2]]
        assert batch.n_active == 0


def test_each_prompt_has_its_own_sampling_and_stops(files):
    path = files["full"][2]
    prompts = [tiny.prompt(10, i) for i in range(3)]
    with FirstBatch(path, **F32) as batch:
        whole = texts(batch.generate(prompts, max_tokens=24, temperature=0.0))
        stops = [whole[0][5:7], None, [whole[2][9:11], whole[2][3:6]]]
        found = batch.generate(prompts, max_tokens=24, temperature=0.0, stop=stops)
        assert texts(found) == [whole[0][: whole[0].index(stops[0])], whole[1], whole[2][: whole[2].index(stops[2][1])]]
        assert [r["choices"][0]["finish_reason"] for r in found][::2] == ["stop", "stop"]
        mixed = batch.generate(prompts, max_tokens=[4, 24, 9], temperature=[0.0, 2.0, 0.0], top_k=[40, 1, 40], seed=5)
        assert [r["usage"]["completion_tokens"] for r in mixed][::2] == [4, 9]
        assert whole[0].startswith(texts(mixed)[0]) and texts(mixed)[1] == whole[1]  # top_k of 1 is greedy


def test_each_option_samples_as_in_llama_cpp_python(files):
    """The same draws of the same seed, for 80 tokens: penalties look back on 64."""
    options = [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}, {"repeat_penalty": 1.9}]
    options += [{"frequency_penalty": 1.5}, {"presence_penalty": 2.0}]
    plain = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
    plain |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "seed": 7}
    path, prompt = files["full"][2], tiny.prompt(10, 3)
    with FirstBatch(path, n_parallel=8, **F32) as batch:
        each = {name: [{**plain, **option}[name] for option in options] for name in plain}
        found = texts(batch.generate([prompt] * 8, max_tokens=80, **each))
    llm = FirstLlama(path, n_ctx=256, verbose=False, **F32)
    assert found == texts(llm.create_completion(prompt, max_tokens=80, **plain | o) for o in options)
    llm.close()
    assert len(set(found)) == 8


def test_memory_stays_what_was_claimed(files):
    with FirstBatch(files["full"][2], n_parallel=4, n_ctx=256, **F32) as batch:
        prompts = [tiny.prompt(200 + i % 40, i) for i in range(40)]
        batch.generate(prompts, max_tokens=100, temperature=1.0, seed=1)
        before = heap.in_use()
        for _ in range(3):
            batch.generate(prompts, max_tokens=100, temperature=1.0, seed=1)
        assert heap.in_use() - before < 1e6
        assert not batch._routings and not batch._mail


def test_it_is_quiet_and_ends_quietly(files):
    code = (
        "import sys; from pyfirst import FirstBatch\n"
        f"b = FirstBatch({str(files['full'][2])!r}, n_parallel=2)\n"
        "s = b.generate(['the quick', 'fox'], max_tokens=9, stream=True); next(s)\n"
        "print(b.n_threads); sys.exit(3)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert int(done.stdout) == usable_cpus()


def test_the_context_is_no_longer_than_the_models(files):
    with FirstBatch(files["full"][2], n_ctx=100_000, n_parallel=2, **F32) as batch:
        assert batch.n_ctx == 512


@pytest.mark.parametrize("kv_unified", [False, True])
def test_llama_cpp_is_told_what_was_asked_for(kv_unified, files):
    with FirstBatch(files["full"][2], n_parallel=3, n_ctx=256, n_threads=3, kv_unified=kv_unified) as batch:
        ctx = batch._ctx.ctx
        assert (llama_cpp.llama_n_threads(ctx), llama_cpp.llama_n_threads_batch(ctx)) == (3, 3)
        # Cells that one sequence may take: of one pool all.
        assert llama_cpp.llama_n_ctx_seq(ctx) == 256 * (3 if kv_unified else 1)


def test_stream_equals_the_whole_and_stops_hide_stop_strings(files):
    path = files["full"][2]
    prompts = [tiny.prompt(10, i) for i in range(3)]
    with FirstBatch(path, **F32) as batch:
        whole = texts(batch.generate(prompts, max_tokens=24, temperature=0.0))
        streamed = [""] * 3
        for i, chunk in batch.generate(prompts, max_tokens=24, temperature=0.0, stream=True):
            streamed[i] += chunk["choices"][0]["text"]
        assert streamed == whole
        # What might have begun a stop string is shown where the answer ends at its length, or by itself.
        drawn = {"max_tokens": 100, "temperature": 1.0, "top_k": 3, "seed": list(range(16))}
        found = batch.generate(prompts[:1] * 16, **drawn)
        assert {result["choices"][0]["finish_reason"] for result in found} == {"stop", "length"}
        held = [[text[-3:] + "x"] for text in texts(found)]
        assert texts(batch.generate(prompts[:1] * 16, **drawn, stop=held)) == texts(found)
        stop = whole[0][4:9]
        result = batch.generate([prompts[0]], max_tokens=24, temperature=0.0, stop=[stop, "never"])[0]
        assert result["choices"][0]["text"] == whole[0][: whole[0].index(stop)]
        assert result["choices"][0]["finish_reason"] == "stop"
        pieces = batch.generate([prompts[0]], max_tokens=24, temperature=0.0, stop=stop, stream=True)
        assert "".join(c["choices"][0]["text"] for _, c in pieces) == whole[0][: whole[0].index(stop)]


def test_a_seed_gives_the_same_text_anywhere(files):
    path = files["full"][2]
    prompt, others = tiny.prompt(10, 1), [tiny.prompt(8, i) for i in range(3)]
    with FirstBatch(path, n_parallel=4, **F32) as batch:
        first = batch.generate([prompt, *others], max_tokens=16, temperature=1.0, seed=[7, 1, 2, 3])
        last = batch.generate([*others, prompt], max_tokens=16, temperature=1.0, seed=[4, 5, 6, 7])
        free = batch.generate([prompt] * 4, max_tokens=16, temperature=1.0)
    assert first[0]["choices"][0]["text"] == last[3]["choices"][0]["text"]
    assert len(set(texts(free))) > 1


def test_logprobs_are_torchs_whoever_is_beside(files):
    """Streamed, whole, with a stop string; a prompt beside that wants none gets none."""
    folder, _, path = files["full"]
    net = tiny.load(folder)
    prompts, masks = [tiny.prompt(6 + 5 * i, i) for i in range(3)], [[1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
    with FirstBatch(path, **F32) as batch:
        arguments = {"max_tokens": 10, "masks": masks, "temperature": 0.0, "logprobs": [3, 0, None]}
        results = batch.generate(prompts, **arguments)
        found = [result["choices"][0]["logprobs"] for result in results]
        streamed: list[list] = [[], [], []]
        for i, chunk in batch.generate(prompts, stream=True, **arguments):
            streamed[i] += (chunk["choices"][0]["logprobs"] or {}).get("token_logprobs", [])
        assert found[2] is None and streamed[2] == []
        for i in (0, 1):
            n = results[i]["usage"]["completion_tokens"]
            ids: list[int] = []
            for k in range(n):
                logits = tiny.gold(net, np.array(masks[i], bool), prompts[i], ids, "full")[-1]
                values = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
                ids.append(int(values.argmax()))
                assert abs(found[i]["token_logprobs"][k] - values.max()) < 1e-3
                best = found[i]["top_logprobs"][k]
                assert min(best.values()) >= np.sort(values)[-3] - 1e-3 and 1 <= len(best) <= (3 if i == 0 else 1)
            assert len(found[i]["tokens"]) == n and streamed[i] == pytest.approx(found[i]["token_logprobs"], abs=1e-4)
        text = texts(results)[0]
        stopped = batch.generate([prompts[0]], **{**arguments, "masks": masks[:1], "logprobs": 1, "stop": text[4:7]})[0]
        assert "".join(stopped["choices"][0]["logprobs"]["tokens"]).startswith(text[: text.index(text[4:7])])
        with pytest.raises(InputError, match="logprobs is -1"):
            batch.generate([prompts[0]], logprobs=-1)


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_steps_that_must_be_short_change_no_answer(prefill, files, monkeypatch):
    """A step takes 5 ms per token here: prompts come in pieces of a tenth of a second."""
    path = files[prefill][2]
    prompts = [tiny.prompt(100 + 20 * i, i) for i in range(3)]
    alone = [solo(path, prompt, 8) for prompt in prompts]
    decode, sizes = FirstBatch._decode, []

    def slow(self):
        sizes.append(self._batch.n_tokens)
        time.sleep(0.005 * self._batch.n_tokens)
        decode(self)

    monkeypatch.setattr(FirstBatch, "_decode", slow)
    with FirstBatch(path, n_parallel=3, **F32) as batch:
        batch.step_seconds = 0.1
        assert answers(batch.generate(prompts, max_tokens=8, temperature=0.0)) == alone
        handles = [batch.submit(Request(tiny.prompt(90, 10 + i))) for i in range(3)]
        batch.step()
        assert sum(batch.routing(handle) is not None for handle in handles) == (prefill == "skip")
    # What decides in "skip" is read at once.
    assert max(sizes) <= 25 if prefill == "full" else sorted(sizes)[-3:] == [100, 120, 140]


@pytest.mark.parametrize("kv_unified", [False, True])
def test_flash_attention_gives_each_sequence_what_it_gives_alone(kv_unified, files):
    """In float16, so answers may differ from those without it, but not from those of one sequence."""
    path = files["full"][2]
    prompts = [tiny.prompt(9 + 5 * i, i) for i in range(4)]
    kwargs = {"max_tokens": 12, "temperature": 0.0, "logprobs": 0}
    with FirstBatch(path, n_parallel=1, flash_attn=True) as batch:
        alone = [batch.generate([p], masks=[m], **kwargs)[0] for p, m in zip(prompts, MASKS, strict=True)]
    with FirstBatch(path, n_parallel=4, kv_unified=kv_unified, flash_attn=True) as batch:
        found = batch.generate(prompts, masks=MASKS, **kwargs)
    for one, other in zip(found, alone, strict=True):
        one, other = one["choices"][0], other["choices"][0]
        assert one["text"] == other["text"]
        assert one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=5e-3)


def test_abandoned_streams_and_cancelled_requests_free_their_places(files):
    path = files["full"][2]
    prompts = [tiny.prompt(10, i) for i in range(6)]
    with FirstBatch(path, n_parallel=2, **F32) as batch:
        expected = texts(batch.generate(prompts, max_tokens=6, temperature=0.0))
        stream = batch.generate(prompts, max_tokens=100, temperature=0.0, stream=True)
        next(stream)
        stream.close()
        assert batch.n_active == 0 and batch.n_waiting == 0
        assert texts(batch.generate(prompts, max_tokens=6, temperature=0.0)) == expected


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler, which programs in the background start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_ctrl_c_in_a_step_ends_only_the_call_that_it_came_to(prefill, files, ctrl_c, monkeypatch):
    """While prompts are being read, and while all decode; then with updates for step() that nobody has seen yet."""
    path, prompts = files[prefill][2], [tiny.prompt(30, i) for i in range(4)]
    alone = [solo(path, prompt, 12)[0] for prompt in prompts]
    decode, left = FirstBatch._decode, []

    def interrupted(self):
        decode(self)
        if left and not left.pop():
            _thread.interrupt_main()

    monkeypatch.setattr(FirstBatch, "_decode", interrupted)
    with FirstBatch(path, n_parallel=4, **F32) as batch:
        for when in range(1, 9):
            mine = batch.submit(Request(prompts[3], max_tokens=12, temperature=0.0))
            stream = batch.generate(prompts[:1], max_tokens=12, temperature=0.0, stream=True)
            found = [next(stream)[1]["choices"][0]["text"]]
            left[:] = [0, *[1] * when]
            with pytest.raises(KeyboardInterrupt):
                batch.generate(prompts[1:3], max_tokens=12, temperature=0.0)
            left.clear()
            found += [chunk["choices"][0]["text"] for _, chunk in stream]
            assert "".join(found) == alone[0]
            text = ""
            while batch.n_active or batch._unclaimed:
                text += "".join(update.text for update in batch.step() if update.request == mine)
            assert text == alone[3]
        assert texts(batch.generate(prompts, max_tokens=12, temperature=0.0)) == alone


def test_closing_says_so_to_streams_and_later_calls(files):
    batch = FirstBatch(files["full"][2], n_parallel=1, **F32)
    stream = batch.generate([tiny.prompt(9, 1), tiny.prompt(9, 2)], max_tokens=99, temperature=0.0, stream=True)
    next(stream)
    batch.close()
    batch.close()
    for call in (
        lambda: list(stream),
        lambda: batch.step(),
        lambda: batch.submit(Request([5])),
        lambda: batch.tokenize("x"),
        lambda: batch.text([5]),
        lambda: batch.threshold_for(0.5),
        lambda: batch.vocab,
    ):
        with pytest.raises(RuntimeError, match="this FirstBatch is closed"):
            call()


@pytest.mark.parametrize(("kind", "text"), [(FirstBatch, "x"), (FirstLlama, b"x")])
def test_closing_waits_for_a_thread_that_tokenizes(kind, text, files):
    model, entered, go_on = kind(files["full"][2], n_ctx=64, **F32), threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        entered.set()
        go_on.wait(30)
        return [int(model._model.model is not None)]

    model._model.tokenize = slow
    with ThreadPoolExecutor(2) as pool:
        tokens = pool.submit(model.tokenize, text)
        assert entered.wait(30)
        closing = pool.submit(model.close)
        try:
            with pytest.raises(TimeoutError):
                closing.result(0.2)
        finally:
            go_on.set()
        assert tokens.result(30) == [1]
        closing.result(30)


def test_tokenizing_does_not_wait_for_a_step(files):
    batch = FirstBatch(files["full"][2], n_parallel=1, **F32)
    with ThreadPoolExecutor(1) as pool, batch._lock:  # as a step holds it
        assert pool.submit(batch.tokenize, "the").result(30) == batch.tokenize("the")


def test_what_does_not_end_by_itself_fills_the_context(files):
    with FirstBatch(files["full"][2], n_ctx=32, n_parallel=2, **F32) as batch:
        results = batch.generate([tiny.prompt(n, n) for n in (31, 30, 20, 1)], max_tokens=500, temperature=0.0)
        assert [r["choices"][0]["finish_reason"] for r in results] == ["length"] * 4
        assert [r["usage"]["total_tokens"] for r in results] == [32] * 4


WRONG = [
    ("prompts", "the quick"),
    ("prompts", b"the quick"),
    ("prompts", None),
    ("masks", 5),
    ("prompts", [b"x"]),
    ("prompts", [5, 6]),
    ("prompts", [["x"]]),
    ("prompts", [[1.5]]),
    ("max_tokens", None),
    ("max_tokens", "3"),
    ("max_tokens", 1.5),
    ("top_k", 2.5),
    ("seed", 1.5),
    ("seed", True),
    ("logprobs", 0.5),
    ("temperature", "1"),
    ("top_p", None),
    ("threshold", "1"),
    ("threshold", 1e39),
    ("stop", 5),
    ("stop", b"x"),
    ("stop", [["x", 5]]),
]


def test_numbers_of_numpy_and_no_stop_are_as_good(files):
    with FirstBatch(files["full"][2], n_parallel=1, **F32) as batch:
        numbers = {"max_tokens": 4, "top_k": 5, "seed": 6, "logprobs": 1}
        expected = batch.generate([[5, 6, 7]], temperature=0.5, threshold=0.5, **numbers)[0]
        whole = {name: np.int64(value) for name, value in numbers.items()}
        for kind in (np.float32, np.float64):
            options = {"temperature": kind(0.5), "threshold": kind(0.5), "stop": None}
            found = batch.generate([np.array([5, 6, 7])], **options, **whole)[0]
            assert found["choices"] == expected["choices"] and found["usage"] == expected["usage"]


@pytest.mark.parametrize("temperature", [1e-46, 1e-44, 1e-38, 1e-31, 1e-29])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature, files):
    path, prompt, options = files["full"][2], tiny.prompt(9, 1), {"max_tokens": 8, "seed": 1}
    expected = solo(path, prompt, 8)[0]
    with FirstBatch(path, n_parallel=1, **F32) as batch:
        assert texts(batch.generate([prompt], temperature=temperature, **options)) == [expected]
    llm = FirstLlama(path, n_ctx=256, **F32)
    assert texts([llm.create_completion(prompt, temperature=temperature, **options)]) == [expected]


def test_a_step_that_fails_keeps_the_requests_that_wait(files, monkeypatch):
    """Two of one beginning, of which the second waits for the first, and one that cannot start."""
    stem, make = tiny.prompt(60, 1), FirstBatch._sampler

    def broken(self, request):
        if request.seed == 13:
            raise RuntimeError("no sampler")
        return make(self, request)

    monkeypatch.setattr(FirstBatch, "_sampler", broken)
    with FirstBatch(files["full"][2], n_parallel=3, n_batch=16, **F32) as batch:
        good = {batch.submit(Request([*stem, token], max_tokens=2, temperature=0.0)) for token in (5, 6)}
        batch.submit(Request([7, 8], seed=13))
        with pytest.raises(RuntimeError, match="no sampler"):
            batch.step()
        done = set()
        while batch.n_active or batch.n_waiting:
            done |= {update.request for update in batch.step() if update.finish_reason}
        assert done == good


def test_bad_requests_are_value_errors_and_others_go_on(files, tmp_path):
    path = files["full"][2]
    with FirstBatch(path, n_ctx=64, n_parallel=2, **F32) as batch:
        good = tiny.prompt(8, 1)
        expected = texts(batch.generate([good], max_tokens=4, temperature=0.0))
        for arguments in (
            {"prompts": [good, []]},
            {"prompts": [good, tiny.prompt(64)]},
            {"prompts": [[999999]]},
            {"prompts": [good], "masks": [[1, 1]]},
            {"prompts": [good], "masks": [[0.2, 0.9, 0.1, 0.8]]},
            {"prompts": [good], "masks": []},
            {"prompts": [good], "max_tokens": 0},
            {"prompts": [good], "temperature": [0.1, 0.2]},
            {"prompts": [good], "tempreature": 0.1},
            {"prompts": [good], "temperature": -0.1},
            {"prompts": [good], "top_p": float("nan")},
            {"prompts": [good], "seed": 2**32 - 1},
            {"prompts": [good], "stop": [None, ["x"]]},
            {"prompts": [good], "threshold": float("inf")},
            {"prompts": ["\ud800"]},
            {"prompts": ["a" * 3_000_000]},
            {"prompts": [good], "top_k": 2**32 + 1},
            *({"prompts": [good], name: value} for name, value in WRONG),
        ):
            with pytest.raises(InputError, match=list(arguments)[-1].rstrip("s")):
                batch.generate(**arguments)
        assert batch.n_waiting == 0
        assert texts(batch.generate([good], max_tokens=4, temperature=0.0)) == expected
    with pytest.raises(RuntimeError):
        batch.generate([good])
    with FirstBatch(path, routing=False, **F32) as dense, pytest.raises(InputError, match="nothing is routed"):
        dense.generate([good], threshold=0.5)
    for arguments in (
        {"n_parallel": 0},
        {"n_parallel": 10000},
        {"n_ctx": 1},
        {"n_threads": -1},
        {"prefill": "half"},
        {"threshold": float("nan")},
    ):
        with pytest.raises(InputError):
            FirstBatch(path, **arguments)
    with pytest.raises(InputError, match="no such file"):
        FirstBatch(tmp_path / "absent.gguf")
