"""FirstBatch: each sequence equals its solo run, whatever its neighbours do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny

from pyfirst import FirstBatch, FirstLlama, InputError

F32 = {"type_k": 0, "type_v": 0}
MASKS = [[1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1], None]


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    """prefill -> (HF folder, recipe, GGUF whose routers decide by the prompt)."""
    from first_convert.convert import convert

    root = tmp_path_factory.mktemp("batch")
    folder, base = tiny_model("llama")
    made = {}
    for prefill in ("full", "skip"):
        recipe = tiny.recipe(root / prefill, folder, seed=3, prefill=prefill)
        convert(None, base_gguf=base, first=recipe, outfile=root / f"{prefill}.gguf")
        made[prefill] = (folder, recipe, root / f"{prefill}.gguf")
    return made


def solo(path, prompt: list[int], n: int, mask=None, **kwargs) -> tuple[str, dict]:
    """Text and "first" entry of one prompt on an object of its own."""
    with FirstBatch(path, n_parallel=1, **F32) as batch:
        result = batch.generate([prompt], max_tokens=n, masks=[mask], temperature=0.0, **kwargs)[0]
    return result["choices"][0]["text"], result["first"]


def texts(results) -> list[str]:
    return [result["choices"][0]["text"] for result in results]


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_a_solo_run_equals_first_llama(prefill, files):
    _, _, path = files[prefill]
    llm = FirstLlama(path, n_ctx=256, **F32)
    for seed in range(4):
        prompt = tiny.prompt(12 + seed, seed)
        found = solo(path, prompt, 12)
        tokens = list(itertools.islice(llm.generate(prompt, temp=0.0), 12))
        eos = next((i for i, t in enumerate(tokens) if t == llm.token_eos()), len(tokens))
        assert found[0].replace("\ufffd", "") == llm.detokenize(tokens[:eos]).decode("utf-8", "ignore")
        assert llm.routing is not None and found[1] == llm.routing.report()


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


def test_a_shared_prefix_is_read_once(files, monkeypatch):
    path = files["full"][2]
    prefix = tiny.prompt(60, 5)
    prompts = [prefix + tiny.prompt(6, seed=10 + i) for i in range(4)]
    alone = [solo(path, p, 8) for p in prompts]
    with FirstBatch(path, n_parallel=2, **F32) as batch:
        computed = 0
        decode = batch._decode

        def count():
            nonlocal computed
            computed += batch._batch.n_tokens
            decode()

        monkeypatch.setattr(batch, "_decode", count)
        results = batch.generate(prompts, max_tokens=8, temperature=0.0)
    assert [(r["choices"][0]["text"], r["first"]) for r in results] == alone
    assert computed <= 60 + 4 * (6 + 8)


def test_stream_equals_the_whole_and_stops_hide_stop_strings(files):
    path = files["full"][2]
    prompts = [tiny.prompt(10, i) for i in range(3)]
    with FirstBatch(path, **F32) as batch:
        whole = texts(batch.generate(prompts, max_tokens=24, temperature=0.0))
        streamed = [""] * 3
        for i, chunk in batch.generate(prompts, max_tokens=24, temperature=0.0, stream=True):
            streamed[i] += chunk["choices"][0]["text"]
        assert streamed == whole
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


def test_context_end_is_length(files):
    with FirstBatch(files["full"][2], n_ctx=32, n_parallel=2, **F32) as batch:
        results = batch.generate([tiny.prompt(31, 1), tiny.prompt(20, 2)], max_tokens=500, temperature=0.0)
        assert {r["choices"][0]["finish_reason"] for r in results} <= {"length", "stop"}
        assert all(r["usage"]["total_tokens"] <= 33 for r in results)


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
            {"prompts": [good], "masks": []},
            {"prompts": [good], "max_tokens": 0},
            {"prompts": [good], "temperature": [0.1, 0.2]},
            {"prompts": [good], "tempreature": 0.1},
        ):
            with pytest.raises(InputError):
                batch.generate(**arguments)
        assert batch.n_waiting == 0
        assert texts(batch.generate([good], max_tokens=4, temperature=0.0)) == expected
    with pytest.raises(RuntimeError):
        batch.generate([good])
    for arguments in ({"n_parallel": 0}, {"n_parallel": 10000}, {"prefill": "half"}, {"threshold": float("nan")}):
        with pytest.raises(InputError):
            FirstBatch(path, **arguments)
    with pytest.raises(InputError, match="no such file"):
        FirstBatch(tmp_path / "absent.gguf")
