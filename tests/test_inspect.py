"""first-inspect: where a file came from, whether it adds up, and what is said of one that does not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import tiny

from first_convert import child, convert, pack, provenance
from first_convert.checkpoint import Checkpoint
from first_convert.ggufio import Entry
from pyfirst import FirstBatch, FirstLlama
from pyfirst import metadata as key
from pyfirst.__main__ import main as info_main
from pyfirst.cli.bench import main as bench_main
from pyfirst.cli.inspect import build_parser, inspect, main
from pyfirst.cli.run import main as run_main
from pyfirst.errors import InputError

CALIBRATION = {"threshold": [0.25, 0.5], "kept": [0.75, 0.5]}


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    monkeypatch.delenv(provenance.EPOCH, raising=False)
    monkeypatch.setattr(convert, "_child", lambda module, job, folder: child.run_job(job))


@pytest.fixture
def made(tiny_model, tmp_path):
    """(model folder, recipe with LoRA, the file made of them)."""
    model = shutil.copytree(tiny_model("llama")[0], tmp_path / "hf")
    recipe = tiny.recipe(
        tmp_path / "my recipe",
        model,
        router_norm="rms",
        protected=[0, 3],
        base_model="some-org/Some-Model",
        calibration=CALIBRATION,
    )
    tiny.adapter(model, recipe, target_modules=["q_proj", "v_proj"])
    (recipe / "README.md").write_text("---\nlicense: mit\n---\n# Recipe\n")
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    return model, recipe, tmp_path / "out.gguf"


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["tekken.json", "spiece.model", "rwkv_vocab_v20230424.txt", "chat_template.jinja"])
def test_every_kind_of_tokenizer_is_on_record(name, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama")[0], tmp_path / "hf")
    for path in (folder / name, folder / "notes.txt"):
        path.write_text("x")
    read = [path.name for path in provenance.checkpoint_files(Checkpoint(folder))]
    assert name in read and "notes.txt" not in read


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    assert "first-inspect smollm2-first.gguf --json" in capsys.readouterr().out


def test_every_input_and_tool_is_on_record(made, tmp_path):
    from pyfirst.native import BINDINGS_VERSION

    model, recipe, path = made
    found = inspect(path)
    assert found["license"] == "mit" and found["base_models"][0]["organization"] == "some-org"
    assert found["problems"] == []
    origin = found["provenance"]
    assert origin["recipe"] == "my recipe" and origin["base_model"] == "some-org/Some-Model"
    assert origin["pyfirst"] and BINDINGS_VERSION in origin["llama_cpp"] and origin["date"] is None
    read = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    expected = {f"checkpoint/{name}": digest(model / name) for name in read}
    expected |= {f"recipe/{name}": digest(recipe / name) for name in ("first_config.json", "first_routers.safetensors")}
    names = ("adapter_config.json", "adapter_model.safetensors")
    expected |= {f"adapter/{name}": digest(recipe / name) for name in names}
    assert expected.items() <= origin["sources"].items()
    assert str(tmp_path) not in json.dumps(origin)  # no folders of the maker's


def test_the_numbers_of_routers_lora_and_types(made):
    _, recipe, path = made
    from pyfirst.recipe import load_recipe

    weight = load_recipe(recipe).weight
    found = inspect(path)
    assert np.allclose([layer["norm"] for layer in found["router_layers"]], np.linalg.norm(weight, axis=1))
    assert [layer["protected"] for layer in found["router_layers"]] == [True, False, False, True]
    assert found["first"]["calibration"] == CALIBRATION
    assert found["lora"] == {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}
    assert found["types"] == {"f32": sum(t.size for t in pack.open_gguf(path).tensors)}
    assert found["bytes"] == path.stat().st_size and found["pieces"] == 1


def test_text_and_json_of_the_command(made, capsys):
    _, recipe, path = made
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    expected = ["some-org", "75% kept at 0.25", "rank 4, alpha 8", "never skipped", "f32 0.8 MB (100.0%)", "|weight|"]
    expected += [digest(recipe / "first_routers.safetensors"), "my recipe", "no problems found", "mit"]
    assert [word for word in expected if word not in text] == []
    assert main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect(path)


def test_same_inputs_give_the_same_bytes(made, tmp_path):
    model, recipe, path = made
    convert.convert(model, first=recipe, outfile=tmp_path / "again.gguf", outtype="f32")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_date_on_request_and_by_source_date_epoch(tiny_model, tmp_path, monkeypatch):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "now.gguf", date=True)
    now = inspect(tmp_path / "now.gguf")["provenance"]["date"]
    assert now[:4] >= "2025" and now.endswith("Z")
    monkeypatch.setenv(provenance.EPOCH, "1700000000")
    for name, source in (("a", {"base_gguf": base}), ("b", {"model_dir": model})):
        for date in (False, True):
            out = tmp_path / f"{name}{date}.gguf"
            kind = {"outtype": "f32"} if "model_dir" in source else {}
            convert.convert(**source, **kind, first=recipe, outfile=out, date=date)
            assert inspect(out)["provenance"]["date"] == "2023-11-14T22:13:20Z"
        assert (tmp_path / f"{name}True.gguf").read_bytes() == (tmp_path / f"{name}False.gguf").read_bytes()
    for wrong in ("yesterday", "9" * 30):
        monkeypatch.setenv(provenance.EPOCH, wrong)
        with pytest.raises(InputError, match=provenance.EPOCH):
            convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


def test_new_routers_keep_what_is_known_of_the_tensors(made, tiny_model, tmp_path):
    """The LoRA in the tensors stays on record with its checkpoint; only the recipe is another."""
    _, _, path = made
    other = tiny.recipe(tmp_path / "other", tiny_model("llama")[0], seed=5)
    convert.convert(base_gguf=path, first=other, outfile=tmp_path / "second.gguf")
    before, after = inspect(path), inspect(tmp_path / "second.gguf")
    assert after["lora"] == before["lora"] and after["problems"] == []
    assert after["provenance"]["recipe"] == "other"
    sources = after["provenance"]["sources"]
    kept = {name: checksum for name, checksum in before["provenance"]["sources"].items() if "recipe/" not in name}
    assert kept.items() <= sources.items()
    assert sources["base/out.gguf"] == digest(path)
    assert sources["recipe/first_config.json"] == digest(other / "first_config.json")
    convert.convert(strip=tmp_path / "second.gguf", outfile=tmp_path / "plain.gguf")
    assert inspect(tmp_path / "plain.gguf")["provenance"] is None


def test_merged_lora_without_routers_is_on_record_too(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "some-org/Base"}))
    convert.convert(model, lora=adapter, outfile=tmp_path / "out.gguf", outtype="f32")
    found = inspect(tmp_path / "out.gguf")
    assert not found["routers"] and found["problems"] == [] and found["lora"]["rank"] == 4
    assert found["provenance"]["base_model"] == "some-org/Base"
    assert found["provenance"]["sources"]["adapter/adapter_config.json"] == digest(path)


def test_file_without_routers_is_sound(tiny_model, capsys):
    assert main([str(tiny_model("llama")[1])]) == 0
    assert "the file runs dense" in capsys.readouterr().out


WEIGHT = [0.5] * 4 * tiny.WIDTH
BREAKS = {
    "no version": ([key.VERSION], [], f"{key.VERSION} is missing"),
    "no bias": ([key.ROUTER_BIAS], [], f"{key.ROUTER_BIAS} is missing"),
    "no shape": ([key.BLOCK_COUNT, key.EMBEDDING_LENGTH], [], f"{key.BLOCK_COUNT} is missing (and 1 more)"),
    "newer": ([], [Entry(key.VERSION, "UINT32", 2)], "first.version is 2, this pyfirst reads 1"),
    "deeper": ([], [Entry(key.BLOCK_COUNT, "UINT32", 6)], "first.block_count is 6, the model's is 4"),
    "wider": ([], [Entry(key.EMBEDDING_LENGTH, "UINT32", 96)], "first.embedding_length is 96, the model's is 64"),
    "short": ([], [Entry(key.ROUTER_BIAS, "ARRAY", [0.0], "FLOAT32")], "holds 1 values, expected 4"),
    "NaN": (
        [],
        [Entry(key.ROUTER_WEIGHT, "ARRAY", [*WEIGHT[:-1], float("nan")], "FLOAT32")],
        "first.router.weight holds NaN or infinity at layer 3",
    ),
    "kind": ([], [Entry(key.ROUTER_WEIGHT, "STRING", "0.5")], "first.router.weight is str, expected f32[]"),
    "kind of items": ([], [Entry(key.ROUTER_BIAS, "ARRAY", [1, 2, 3, 4], "INT32")], "expected f32[]"),
    "norm": ([], [Entry(key.ROUTER_NORM, "STRING", "layer")], "first.router.norm is 'layer'"),
    "prefill": ([], [Entry(key.PREFILL, "STRING", "half")], "first.prefill is 'half'"),
    "threshold": ([], [Entry(key.ROUTER_THRESHOLD, "FLOAT32", 1.5)], "first.router.threshold is 1.5"),
    "threshold not a number": ([], [Entry(key.ROUTER_THRESHOLD, "FLOAT32", float("nan"))], "expected 0 to 1"),
    "window": ([], [Entry(key.WINDOW, "UINT32", 0)], "first.window is 0"),
    "protected": ([], [Entry(key.PROTECTED, "ARRAY", [4], "UINT32")], "names layer 4, the last is 3"),
    "calibration": (
        [],
        [Entry(key.CALIBRATION_KEPT, "ARRAY", [0.5], "FLOAT32")],
        "first.calibration.threshold holds 2 points, first.calibration.kept 1",
    ),
    "calibration's range": (
        [],
        [Entry(key.CALIBRATION_KEPT, "ARRAY", [0.5, 75.0], "FLOAT32")],
        "first.calibration.kept holds 75",
    ),
    "LoRA": ([key.LORA_ALPHA], [], "first.lora.alpha is missing"),
    "checksums": ([], [Entry(key.SOURCE_SHA256, "ARRAY", ["ab"], "STRING")], "first.source.sha256 holds 1"),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_does_not_add_up_is_named(name, form, made, tmp_path, capsys):
    lost, added, words = BREAKS[name]
    gone = {*lost, *(entry.name for entry in added)}
    broken = tmp_path / "broken.gguf"
    pack.rewrite(pack.open_gguf(made[2]), broken, added, lambda key: key not in gone)
    assert main([str(broken), *form]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and words in err and str(broken) in err
    if form:
        assert words.split(" (and")[0] in " ".join(json.loads(out)["problems"])
    else:
        assert f"problem: {words.split(' (and')[0].partition(' ')[0]}" in out or words in out


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry("general.architecture", "ARRAY", ["llama"], "STRING"), "is str[], expected str"),
        (Entry("llama.block_count", "STRING", "4"), "is str, expected a whole number"),
        (Entry("llama.block_count", "UINT32", 0), "is 0, expected 1 to 512"),
        (Entry("llama.block_count", "UINT32", 2**32 - 1), "is 4294967295, expected 1 to 512"),
        (Entry("llama.context_length", "ARRAY", [512], "INT32"), "is i32[], expected a whole number"),
        (Entry("split.count", "FLOAT32", 2.0), "is f32, expected a whole number"),
        (Entry("general.base_model.count", "STRING", "1"), "is str, expected a whole number"),
        (Entry(key.PREFILL, "UINT32", 1), "is u32, expected str"),
        (Entry("llama.attention.layer_norm_rms_epsilon", "FLOAT32", -1.5), "is -1.5, expected 0 or more"),
        (Entry("llama.attention.layer_norm_rms_epsilon", "FLOAT32", float("nan")), "is nan, expected 0 or more"),
    ],
    ids=lambda value: value.name if isinstance(value, Entry) else value,
)
def test_a_key_of_another_type_is_one_line_from_every_reader(entry, words, made, tmp_path, capfd):
    path = tmp_path / "broken.gguf"
    pack.rewrite(pack.open_gguf(made[2]), path, [entry], lambda name: name != entry.name)
    for command, options in (
        (main, [str(path)]),
        (info_main, ["info", str(path)]),
        (run_main, ["-m", str(path), "-p", "x"]),
        (bench_main, ["-m", str(path), "--predict", "pi5"]),
    ):
        assert command(options) == 2
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and str(path) in err and entry.name in err and words in err
    for open_it in (FirstLlama, FirstBatch):
        with pytest.raises(InputError, match=entry.name):
            open_it(path)


@pytest.mark.parametrize("threshold", [-0.5, 1.5])
def test_a_threshold_that_no_score_can_pass_is_refused_where_the_file_runs(threshold, made, tmp_path):
    path, entry = tmp_path / "broken.gguf", Entry(key.ROUTER_THRESHOLD, "FLOAT32", threshold)
    pack.rewrite(pack.open_gguf(made[2]), path, [entry], lambda name: name != entry.name)
    for open_it in (FirstLlama, FirstBatch):
        with pytest.raises(InputError, match=f"{entry.name} is {threshold}, expected 0 to 1"):
            open_it(path, n_ctx=64)
    FirstLlama(path, n_ctx=64, threshold=0.5).close()


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "header", "one byte"])
def test_broken_file_is_one_line(kind, made, tmp_path, capfd):
    path = tmp_path / "file"
    whole = made[2].read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        cuts = {"text": b"hello, world\n" * 9, "empty": b"", "header": whole[:3000], "one byte": whole[:-1]}
        path.write_bytes(cuts[kind])
    assert main([str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err


def test_options_that_cannot_work_are_one_line(made, capfd):
    for option, value, words in (("-t", "0", "-t is 0"), ("-c", "1", "-c is 1"), ("--limit", "0", "--limit is 0")):
        assert main([str(made[2]), "-p", "x", option, value]) == 2
        out, err = capfd.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and words in err


def test_absurd_counts_end_soon(made, tmp_path):
    """Counts from a hostile file are not believed."""
    source = pack.open_gguf(made[2])
    added = [Entry("general.base_model.count", "UINT32", 2**32 - 1), Entry("split.count", "UINT32", 2**32 - 1)]
    for entry in added:
        pack.rewrite(source, tmp_path / "hostile.gguf", [entry], lambda name, entry=entry: name != entry.name)
        command = [sys.executable, "-m", "pyfirst.cli.inspect", str(tmp_path / "hostile.gguf")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == (0 if entry is added[0] else 2), done.stderr


def test_split_model_is_seen_whole_from_its_first_piece(made, tiny_model, tmp_path, capsys):
    from first_convert.upstream import gguf

    source = pack.open_gguf(made[2])
    names = [f"model-{i + 1:05}-of-00002.gguf" for i in range(2)]
    half = len(source.tensors) // 2
    lib = gguf()
    for number, name in enumerate(names):
        writer = lib.GGUFWriter(tmp_path / name, arch="llama")
        for field in source.keys if number == 0 else ():
            if field.startswith(("first.", "llama.")) and field not in (key.SOURCE_NAMES, key.SOURCE_SHA256):
                kinds = {4: "UINT32", 6: "FLOAT32", 7: "BOOL", 8: "STRING", 9: "ARRAY"}
                kind = lib.GGUFValueType[kinds[source.keys[field].kind]]
                (item,) = struct.unpack_from("<I", source.data, source.keys[field].value) if kind == 9 else (0,)
                writer.add_key_value(field, source.get(field), kind, lib.GGUFValueType(item) if kind == 9 else None)
        for suffix, value in (("no", number), ("count", 2)):
            writer.add_uint16(f"split.{suffix}", value)
        for tensor in source.tensors[:half] if number == 0 else source.tensors[half:]:
            data = np.frombuffer(source.data[tensor.start : tensor.start + tensor.size], np.float32)
            writer.add_tensor(tensor.name, data.reshape(tensor.shape[::-1]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = inspect(tmp_path / names[0])
    assert found["pieces"] == 2 and found["problems"] == [] and len(found["router_layers"]) == 4
    assert found["types"] == {"f32": sum(t.size for t in source.tensors)}
    assert main([str(tmp_path / names[1])]) == 2
    assert f"piece 2 of 2; give the first, {names[0]}" in capsys.readouterr().err
    (tmp_path / names[1]).unlink()
    assert main([str(tmp_path / names[0])]) == 2
    assert names[1] in capsys.readouterr().err
