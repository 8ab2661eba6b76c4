"""first-bench: the rows it measures, the graphs it counts, what it refuses. No timing is asserted."""

from __future__ import annotations

import json

import pytest
import tiny
from test_patch import STOCK

from first_convert import convert
from pyfirst.cli.bench import bench, main, parse_skipped, spread
from pyfirst.errors import InputError

QUICK = ("--prompt-length", "24", "-n", "4", "--repeats", "2")


def test_rows_against_the_unpatched_library_and_no_rebuilds(tiny_model, capfd):
    path = str(tiny_model("llama")[1])
    capfd.readouterr()
    assert main(["-m", path, *QUICK, "--skipped", "1,50%", "--stock-lib", str(STOCK), "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert err == ""
    expected = [
        ("stock", "dense", 0),
        ("pyfirst", "alone", 0),
        ("pyfirst", "dense", 0),
        *(("pyfirst", "forced", n) for n in (0, 1, 2)),
    ]
    for phase in ("prefill", "decode"):
        rows = [run for run in result["runs"] if run["phase"] == phase]
        assert [(run["library"], run["mode"], run["layers_skipped"]) for run in rows] == expected
        assert [run["skipped"] for run in rows] == [0, 0, 0, 0, 0.25, 0.5]
        for run in rows:
            assert len(run["samples"]) == 2 and run["tokens_per_s"] > 0 and run["iqr"] >= 0
        dense = rows[2]["tokens_per_s"]
        assert [run["speedup"] for run in rows[2:]] == pytest.approx([run["tokens_per_s"] / dense for run in rows[2:]])
        alone = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
        assert result["dense_against_stock"][phase] == pytest.approx(alone)
    assert result["graph"] == {"steps": 64, "rebuilds": 0}
    assert result["machine"]["threads"] == 1 and result["machine"]["cpu"]
    assert result["model"]["layers"] == 4 and result["load"] is None


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
        "dense, regions inactive",
        "0 of 4 layers skipped",
        "2 of 4 layers skipped",
        "routers read, none skipped",
        "of prefill",
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
            assert len(set(layers)) == count and layers[0] == 1 and layers[-1] == n_layer - 2


def test_skipped_is_numbers_or_shares():
    assert parse_skipped(None, 30) == [0, 8, 15]
    assert parse_skipped("0,8,15", 30) == parse_skipped("15, 8", 30) == [0, 8, 15]
    assert parse_skipped("10%,50%", 30) == [0, 3, 15]
    assert parse_skipped(None, 2) == [0]
    for text in ("29", "-1", "x", "", "nan%", "120%"):
        with pytest.raises(InputError, match="--skipped"):
            parse_skipped(text, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "{missing}"], "no such file"),
        (["-m", "{text}"], "not a usable GGUF"),
        (["--skipped", "3"], "0 to 2 of 4 layers"),
        (["-n", "0"], "-n is 0"),
        (["-t", "0"], "-t is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--prompt-length", "600"], "trained for 512"),
        (["--stock-lib", "{folder}"], "no libllama there"),
        (["--stock-lib", "{ours}"], "this library is patched"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_wrong_input_is_one_line_and_exit_code_2(options, message, tiny_model, tmp_path, capfd):
    from pyfirst import native

    (tmp_path / "text").write_text("hello, world\n" * 9)
    names = {name: str(tmp_path / name) for name in ("missing", "text")}
    names |= {"folder": str(tmp_path), "ours": str(native.lib_dir())}
    options = [option.format(**names) for option in options]
    if "-m" not in options:
        options += ["-m", str(tiny_model("llama")[1])]
    code = main(options)
    out, err = capfd.readouterr()
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and message in err


def test_what_the_worker_refuses_arrives_with_its_reason(tiny_model, tmp_path):
    """The file is whole, so only loading finds that its routers are of a version that is not known."""
    from first_convert.ggufio import Entry, rewrite
    from first_convert.pack import open_gguf

    path = tmp_path / "newer.gguf"
    rewrite(open_gguf(tiny_model("llama")[1]), path, [Entry("first.version", "UINT32", 9)], lambda name: True)
    with pytest.raises(InputError, match=r"newer\.gguf.*first\.version"):
        bench(str(path))
