"""first-bench: the rows it measures, the graphs it counts, what it refuses. No timing is asserted."""

from __future__ import annotations

import contextlib
import json
import math
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from native_model import opened
from test_patch import STOCK

from first_convert import convert
from first_convert.ggufio import Entry, Gguf, rewrite
from first_convert.pack import open_gguf
from pyfirst import FirstLlama, native, predict
from pyfirst.cli import bench_files
from pyfirst.cli.bench import Worker, _Kind, bench, compare, main, parse_lengths, parse_skipped, predicted, spread
from pyfirst.cli.bench_worker import TEXT
from pyfirst.errors import InputError
from pyfirst.fit import Room

QUICK = ("--prompt-length", "24", "-n", "4", "--repeats", "2")


def test_the_arithmetic_over_made_up_answers():
    """Four layers; a token takes a second and one more for each layer, but forced skipping wastes a second of it."""
    per_token = {
        _Kind("dense", "stock", "stock", "plain"): 4.5,
        _Kind("dense", "pyfirst", "dense", "plain"): 5,
        _Kind("pruned", "pyfirst", "pruned", "plain", 2): 3,
        _Kind("forced", "pyfirst", "regions", "masked", 0): 5,
        _Kind("forced", "pyfirst", "regions", "masked", 2): 4,
        _Kind("scored", "pyfirst", "regions", "scored"): 5.5,
        _Kind("routed", "pyfirst", "regions", "routed"): 4,
    }
    turns = (0.9, 1, 1.4)  # the median counts
    answers = {
        (8, kind): [{"prefill": 8 * s * x, "decode": 2 * s * x, "kept": 3} for x in turns]
        for kind, s in per_token.items()
    }
    found = compare(answers, n_layer=4, n_predict=2, full_prompt=True)
    assert [(fit["phase"], fit["from"]) for fit in found["fit"]] == [("prefill", "pruned"), ("decode", "pruned")]
    assert all([fit["fixed_s"], fit["layer_s"]] == pytest.approx([1, 1]) for fit in found["fit"])
    assert found["dense_against_stock"] == {"prefill": {"8": 0.9}, "decode": {"8": 0.9}}
    assert found["router_cost"] == {"8": pytest.approx(0.1)}
    rows = {
        (run["phase"], run["mode"], run["layers_skipped"]): run for run in found["runs"] if run["library"] != "stock"
    }
    half = rows["decode", "forced", 2]
    assert half["tokens_per_s"] == pytest.approx(1 / 4) and half["skipped"] == 0.5
    assert [half["speedup"], half["ideal"], half["efficiency"]] == pytest.approx([5 / 4, 5 / 3, 3 / 4])
    assert rows["decode", "routed", 1]["ideal"] == pytest.approx(5 / 4)
    assert rows["prefill", "routed", 1]["ideal"] == pytest.approx(1)  # its prompt goes through all layers
    few = {key: samples for key, samples in answers.items() if key[1].mode in ("dense", "forced")}
    found = compare(few, n_layer=4, n_predict=2, full_prompt=True)
    fit = found["fit"][1]
    assert fit["from"] == "forced" and [fit["fixed_s"], fit["layer_s"]] == pytest.approx([3, 0.5])
    assert found["router_cost"] is None


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_folders_of_killed_runs_go_and_others_stay(tmp_path):
    with bench_files.folder() as own:
        dead = subprocess.Popen(["true"])
        dead.wait()
        left = own.with_name(f"bench.{dead.pid}.abc")
        left.mkdir()
        (left / "big.gguf").touch()
        with bench_files.folder():
            assert own.is_dir()
            assert not left.exists()
    assert not list(bench_files.cache_dir().iterdir())


def test_rows_against_the_unpatched_library_and_no_rebuilds(tiny_model, tmp_path, capfd):
    path = str(tiny_model("llama")[1])
    plot = tmp_path / "out.png"
    capfd.readouterr()
    options = ("-p", "8,24", "-n", "4", "--repeats", "3", "--skipped", "1,50%", "--plot", str(plot))
    assert main(["-m", path, *options, "--stock-lib", str(STOCK), "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert err == ""
    expected = [
        ("stock", "dense", 0),
        ("pyfirst", "dense", 0),
        ("pyfirst", "pruned", 2),
        *(("pyfirst", "forced", n) for n in (0, 1, 2)),
    ]
    for phase in ("prefill", "decode"):
        for length in (8, 24):
            rows = [run for run in result["runs"] if (run["phase"], run["prompt"]) == (phase, length)]
            assert [(run["library"], run["mode"], run["layers_skipped"]) for run in rows] == expected
            assert [run["skipped"] for run in rows] == [0, 0, 0.5, 0, 0.25, 0.5]
            (fit,) = (fit for fit in result["fit"] if (fit["phase"], fit["prompt"]) == (phase, length))
            dense, pruned = rows[1], rows[2]
            assert fit["from"] == "pruned"
            for run, kept in ((dense, 4), (pruned, 2)):  # the line goes through both
                assert 1 / run["tokens_per_s"] == pytest.approx(fit["fixed_s"] + kept * fit["layer_s"])
            for run in rows:
                kept = 4 - run["layers_skipped"]
                assert len(run["samples"]) == 3 and run["iqr"] >= 0
                assert run["tokens_per_s"] == pytest.approx(sorted(run["samples"])[1])
                assert run["speedup"] == pytest.approx(run["tokens_per_s"] / dense["tokens_per_s"])
                alone = 1 / (fit["fixed_s"] + kept * fit["layer_s"])
                assert run["ideal"] == pytest.approx(alone / dense["tokens_per_s"])
                assert run["efficiency"] == pytest.approx(run["speedup"] / run["ideal"])
            against = dense["tokens_per_s"] / rows[0]["tokens_per_s"]
            assert result["dense_against_stock"][phase][str(length)] == pytest.approx(against)
    assert result["graph"] == {"steps": 64, "rebuilds": 0}
    assert result["machine"]["threads"] == 1 and result["machine"]["cpu"]
    assert {"governor", "temperature_c"} <= set(result["machine"])
    assert all(size > 1e6 for size in result["peak_bytes"].values())
    assert result["model"]["layers"] == 4 and result["load"] is None and result["router_cost"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "cache").rglob("*.gguf")) == []


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_routed_rows_say_what_the_routers_decided(prefill, tiny_model, tmp_path):
    folder, path = tiny_model("qwen3")
    recipe = tiny.recipe(tmp_path / "recipe", folder, mask=[1, 0, 1, 1], prefill=prefill)
    convert.convert(base_gguf=path, first=recipe, outfile=tmp_path / "routed.gguf")
    result = bench(str(tmp_path / "routed.gguf"), prompt_length=24, n_predict=4, repeats=1, skipped="0")
    rows = {run["phase"]: run for run in result["runs"] if run["mode"] == "routed"}
    (pruned,) = (run for run in result["runs"] if run["mode"] == "pruned" and run["phase"] == "prefill")
    assert [run["skipped"] for run in rows.values()] == [0.25, 0.25]
    # what skips nothing in the prompt is not measured against a prompt that does
    assert (rows["prefill"]["ideal"] == 1) == (prefill == "full")
    assert pruned["ideal"] != 1 and rows["decode"]["ideal"] != 1
    assert list(result["router_cost"]) == ["24"]


def test_all_tokens_of_the_window_decide(tmp_path):
    """Also those behind the first 512: a threshold between both decisions tells."""
    folder = tiny.make("llama", tmp_path / "hf", max_position_embeddings=1024)
    base = tiny.gguf(folder, tmp_path / "base.gguf")

    def routed(**config) -> str:
        recipe = tiny.recipe(tmp_path / "recipe", folder, seed=3, prefill="skip", **config)
        convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "routed.gguf", force=True)
        return str(tmp_path / "routed.gguf")

    scores = []
    for window in (512, 700):
        llm = FirstLlama(routed(window=window, threshold=0.0), n_ctx=708)
        tokens = llm.tokenize(TEXT.encode(), add_bos=False)
        llm.eval((tokens * 700)[:700])
        scores.append(llm.routing.scores)
        llm.close()
    layer = int(np.abs(scores[0] - scores[1]).argmax())
    threshold = float(scores[0][layer] + scores[1][layer]) / 2
    alone = routed(window=700, threshold=threshold, protected=[other for other in range(4) if other != layer])
    result = bench(alone, prompt_length=700, n_predict=4, repeats=1, skipped="0")
    expected = 0.25 if scores[1][layer] < threshold else 0
    assert {run["skipped"] for run in result["runs"] if run["mode"] == "routed"} == {expected}


def test_table_of_a_file_with_routers_and_the_time_to_load(tiny_model, tmp_path, capfd):
    folder, path = tiny_model("qwen3")
    recipe = tiny.recipe(tmp_path / "recipe", folder, mask=[1, 0, 1, 1])
    convert.convert(base_gguf=path, first=recipe, outfile=tmp_path / "routed.gguf")
    capfd.readouterr()
    assert main(["-m", str(tmp_path / "routed.gguf"), *QUICK, "--load-time", "-t", "2"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for text in (
        "threads 2",
        "pruned to 2 layers",
        "0 of 4 layers skipped",
        "2 of 4 layers skipped",
        "routers read, none skipped",
        "routed, 1 of 4 skipped",
        "routers cost of prefill",
        "64 decode steps with another mask each: 0 graph rebuilds",
        "with arrays of 131072 floats",
    ):
        assert text in out
    assert "unpatched" not in out


def test_layers_are_spread_and_spare_both_ends():
    assert spread(30, 0) == [] and spread(30, 1) == [15] and spread(3, 1) == [1]
    for n_layer in (4, 16, 30, 31):
        for count in range(2, n_layer - 1):
            layers = spread(n_layer, count)
            assert len(set(layers)) == count and layers[0] >= 1 and layers[-1] <= n_layer - 2


def test_skipped_is_numbers_or_shares():
    assert parse_skipped(None, 30) == [0, 3, 6, 8, 9, 12, 15]
    assert parse_skipped(None, 16) == [0, 2, 3, 4, 5, 6, 8]
    assert parse_skipped("0,8,15", 30) == parse_skipped("15, 8", 30) == [0, 8, 15]
    assert parse_skipped("10%,50%", 30) == [0, 3, 15]
    assert parse_skipped(None, 2) == [0]
    for text in ("29", "-1", "x", "", "nan%", "120%"):
        with pytest.raises(InputError, match="--skipped"):
            parse_skipped(text, 30)


def test_prompt_lengths():
    assert parse_lengths("256, 64,64") == [64, 256] and parse_lengths(24) == [24]
    for text in ("", "0", "-1", "64,x", "64,"):
        with pytest.raises(InputError, match="--prompt-length"):
            parse_lengths(text)


# Parameters of the released models, the shared matrix counted once.
@pytest.mark.parametrize(
    ("name", "count"), [("llama-3.2-1b", 1235814400), ("llama-3.2-3b", 3212749824), ("qwen3-0.6b", 596049920)]
)
def test_shapes_have_the_parameters_of_the_models(name, count):
    assert sum(math.prod(dims) for _, dims in bench_files.SHAPES[name].tensors()) == count


SMALL = {
    "llama-3.2-1b": bench_files.Shape("llama", 4, 256, 512, 4, 2, 64, 300, 512, 5e5, 1e-5),
    "qwen3-0.6b": bench_files.Shape("qwen3", 4, 256, 512, 8, 4, 64, 300, 512, 1e6, 1e-6),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q4_K", "f16"])
def test_synthetic_file_runs_and_has_the_type(name, kind, tmp_path):
    path = tmp_path / "made.gguf"
    bench_files.write_synthetic(SMALL[name], path, kind)
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.3.ffn_down.weight"] == kind.upper() and types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q6_K" if kind in ("q4_0", "q4_K") else kind.upper())
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    values = gguf.quants.dequantize(up.data, up.tensor_type)
    assert values.shape == (512, 256) and values.std() == pytest.approx(0.02, rel=0.05)
    with opened(path) as model:
        assert model.n_vocab == 300 and np.isfinite(model.feed([116, 104, 101])).all()


def test_synthetic_from_the_command_line_leaves_nothing_unless_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench_files, "SHAPES", SMALL)
    cache = tmp_path / "cache" / "pyfirst"
    assert main(["--synthetic", "llama-3.2-1b", *QUICK, "--skipped", "1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["model"]["tensor_type"] == "q4_0"
    assert list(cache.iterdir()) == []
    for _ in range(2):
        assert main(["--synthetic", "qwen3-0.6b", *QUICK, "--skipped", "1", "--type", "q8_0", "--keep"]) == 0
        assert [file.name for file in cache.iterdir()] == ["qwen3-0.6b-q8_0.gguf"]


def test_a_prediction_for_a_synthetic_file_writes_its_header_only(tmp_path, monkeypatch, capfd):
    shape = SMALL["llama-3.2-1b"]
    for name, weights in (("whole", True), ("header", False)):
        bench_files.write_synthetic(shape, tmp_path / name, weights=weights)
    assert predict.token_bytes(tmp_path / "header") == predict.token_bytes(tmp_path / "whole")
    whole, header = ((tmp_path / name).stat() for name in ("whole", "header"))
    assert header.st_size == whole.st_size and header.st_blocks < whole.st_blocks / 2
    monkeypatch.setattr(bench_files, "SHAPES", {"llama-3.2-1b": shape})
    assert main(["--synthetic", "llama-3.2-1b", "--predict", "10", "-p", "64", "-n", "8", "--json"]) == 0
    runs = json.loads(capfd.readouterr().out)["runs"]
    assert runs == predicted(str(tmp_path / "whole"), 10, prompt_length="64", n_predict=8)["runs"]


def test_without_a_pruned_copy_the_line_is_fitted_to_the_forced_runs(tiny_model, monkeypatch):
    def prune(*_):
        raise InputError("split in pieces")

    monkeypatch.setattr(bench_files, "prune", prune)
    result = bench(str(tiny_model("llama")[1]), prompt_length=8, n_predict=2, repeats=1, skipped="1,2")
    assert {run["mode"] for run in result["runs"]} == {"dense", "forced"}
    for fit in result["fit"]:
        rows = [run for run in result["runs"] if run["phase"] == fit["phase"]]
        seconds = [1 / run["tokens_per_s"] for run in (rows[0], rows[2], rows[3])]  # dense, 1 and 2 skipped
        layer, fixed = np.polyfit([4, 3, 2], seconds, 1)
        assert fit["from"] == "forced" and (fit["fixed_s"], fit["layer_s"]) == pytest.approx((fixed, layer))


@pytest.mark.parametrize("home", [True, False])
def test_without_a_cache_folder_there_is_no_pruned_copy(home, tiny_model, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing" if home else "")
    if not home:  # a user whom the system does not know
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
        assert main(["--synthetic", "qwen3-0.6b", "--predict", "pi5"]) == 2
        assert capsys.readouterr().err.startswith("first-bench: error: no home directory")
    result = bench(str(tiny_model("llama")[1]), prompt_length=8, n_predict=2, repeats=1, skipped="1,2")
    assert {run["mode"] for run in result["runs"]} == {"dense", "forced"}


def test_a_picture_that_fails_costs_no_result_and_no_other_file(tiny_model, tmp_path, monkeypatch, capfd):
    model, plot = shutil.copy(tiny_model("llama")[1], tmp_path / "model.pdf"), tmp_path / "x.png"
    options = ["-m", str(model), "-p", "8", "-n", "2", "--repeats", "1", "--skipped", "2", "--json", "--plot"]
    before = model.read_bytes()
    for path, message in ((model, "is read, so it cannot be written to"), ("/proc/x.png", "No such file")):
        assert main([*options, str(path)]) == 2
        out, err = capfd.readouterr()
        assert out == "" and message in err and model.read_bytes() == before
    assert main([*options, str(plot)]) == 0
    capfd.readouterr()
    drawn = plot.read_bytes()

    def full(self, path, **_):
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main([*options, str(plot)]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["runs"] and "No space left" in err
    assert plot.read_bytes() == drawn and not list(tmp_path.glob("*.part*"))


def test_what_memory_cannot_hold_is_refused_with_the_numbers(tiny_model, monkeypatch):
    monkeypatch.setattr("pyfirst.fit.rooms", lambda: [Room(10**6, "a test")])
    with pytest.raises(InputError, match=r"needs about \d+ MB .*, 1 MB are available \(a test\)"):
        bench(str(tiny_model("llama")[1]), prompt_length=8, n_predict=2, repeats=1)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "killed, perhaps for want of memory"),
        (signal.SIGILL, f"{native.lib_dir()}: this library runs into an instruction that the processor does not know"),
    ],
)
def test_a_measuring_process_that_is_killed_says_so(number, message):
    with pytest.raises(InputError, match=message), contextlib.closing(Worker(native.lib_dir(), True)) as worker:
        worker._process.send_signal(number)
        worker.ask("memory")


def test_a_file_without_a_vocabulary_is_measured_too(tiny_model, tmp_path):
    path, source = tmp_path / "mute.gguf", open_gguf(tiny_model("llama")[1])
    none = [Entry("tokenizer.ggml.model", "STRING", "none")]
    rewrite(source, path, none, lambda name: not name.startswith("tokenizer."))
    result = bench(str(path), prompt_length=8, n_predict=2, repeats=1, skipped="2")
    assert {run["mode"] for run in result["runs"]} == {"dense", "pruned", "forced"}


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_pruned_copy_computes_what_the_mask_does(arch, tiny_model, tmp_path):
    path = tiny_model(arch)[1]
    bench_files.prune(Gguf(path), [0, 3], tmp_path / "pruned.gguf")
    ids = tiny.prompt(12)
    with opened(tmp_path / "pruned.gguf") as model:
        assert model.n_layer == 2
        pruned = model.feed(ids)
    with opened(path) as model:
        model.set_mask([1, 0, 0, 1])
        masked = model.feed(ids)
    assert np.abs(pruned - masked).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "{missing}"], "no such file"),
        (["-m", "{text}"], "not a usable GGUF"),
        (["--skipped", "3"], "0 to 2 of 4 layers"),
        (["-n", "0"], "-n is 0"),
        (["-t", "0"], "-t is 0"),
        (["-t", "100000"], "-t is 100000, expected 1 to 512"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--prompt-length", "600"], "trained for 512"),
        (["-t", "2", "--clock", "cpu"], "--clock cpu with -t 2"),
        (["--plot", "x.txt"], "--plot x.txt"),
        (["--plot", "{missing}/x.png"], "no folder"),
        (["--plot", "{plots}.png"], "plots.png: a folder, expected a file"),
        (["--synthetic", "gpt-9"], "expected one of llama-3.2-1b"),
        (["--synthetic", "qwen3-0.6b", "--type", "q9"], "expected one of f32"),
        (["--synthetic", "qwen3-0.6b", "--keep", "--predict", "10"], "leaves no file to --keep"),
        (["--type", "q8_0"], "for the file of --synthetic"),
        (["--keep"], "for the file of --synthetic"),
        (["--predict", "10", "--load-time"], "--predict makes none"),
        (["--predict", "10", "--stock-lib", "{folder}"], "--predict makes none"),
        (["--stock-lib", "{folder}"], "no libllama there"),
        (["--stock-lib", "{ours}"], "this library is patched"),
        (["--stock-lib", "{broken}"], "--stock-lib {broken}: Failed to load shared library"),
        (["--stock-lib", "{other}"], "--stock-lib {other}: Shared library with base name 'llama' not found"),
        (["-m", "{piece}", "--load-time"], "one of 2 pieces; join them first"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_wrong_input_is_one_line_and_exit_code_2(options, message, tiny_model, tmp_path, capfd):
    (tmp_path / "text").write_text("hello, world\n" * 9)
    (tmp_path / "plots.png").mkdir()
    for library in ("broken/libllama.so", "other/llama.py"):
        (tmp_path / library).parent.mkdir()
        (tmp_path / library).write_text("hello")
    rewrite(open_gguf(tiny_model("llama")[1]), tmp_path / "piece", [Entry("split.count", "UINT32", 2)], lambda _: True)
    names = {name: str(tmp_path / name) for name in ("missing", "text", "plots", "broken", "other", "piece")}
    names |= {"folder": str(tmp_path), "ours": str(native.lib_dir())}
    options, message = [option.format(**names) for option in options], message.format(**names)
    if "-m" not in options and "--synthetic" not in options:
        options += ["-m", str(tiny_model("llama")[1])]
    capfd.readouterr()  # making the model says a word too
    code = main(options)
    out, err = capfd.readouterr()
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and message in err


def test_what_the_worker_refuses_arrives_with_its_reason(tiny_model, tmp_path):
    """The file is whole, so only loading finds that its routers are of a version that is not known."""
    path = tmp_path / "newer.gguf"
    rewrite(open_gguf(tiny_model("llama")[1]), path, [Entry("first.version", "UINT32", 9)], lambda name: True)
    with pytest.raises(InputError, match=r"newer\.gguf.*first\.version"):
        bench(str(path))
