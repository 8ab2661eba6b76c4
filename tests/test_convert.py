"""first-convert as a whole: what it writes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from first_convert import check, child, convert, quantize
from first_convert.convert import build_parser, main
from first_convert.upstream import gguf
from pyfirst import FirstLlama
from pyfirst import metadata as key
from pyfirst.errors import InputError
from pyfirst.training.data import encode


@pytest.fixture(autouse=True)
def same_process(request, monkeypatch):
    """The child processes' work, done here to save their imports; "processes" tests start them."""
    if "processes" not in request.fixturenames:
        jobs = {
            "first_convert.child": child.run_job,
            "first_convert.quantize": quantize.run_job,
        }
        monkeypatch.setattr(convert, "_child", lambda module, job, folder: jobs[module](job))


@pytest.fixture
def processes():
    """Marks a test that runs the real child processes."""


def copy_of(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(path) -> tuple[dict, dict]:
    reader = gguf().GGUFReader(path)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors}


def logits(path, ids):
    from native_model import opened

    with opened(path, n_threads=1) as model:
        return model.feed(ids)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    assert "first-convert smollm2-135m-hf --first recipe" in capsys.readouterr().out


def test_without_a_recipe_the_file_is_upstreams_own(tiny_model, tmp_path):
    model, upstreams = tiny_model("llama")
    convert.convert(model, outfile=tmp_path / "out.gguf", outtype="f32")
    assert (tmp_path / "out.gguf").read_bytes() == upstreams.read_bytes()


def test_recipe_lands_in_metadata_and_tensors_stay(tiny_model, tmp_path):
    model, upstreams = tiny_model("llama")
    recipe = tiny.recipe(
        tmp_path / "recipe",
        model,
        router_norm="rms",
        threshold=0.625,
        prefill="skip",
        window=99,
        protected=[3, 0],
        base_model="some-org/Some-Model-1B",
        calibration={"threshold": [0.25, 0.5], "kept": [0.875, 0.5]},
    )
    result = convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    assert result["routers"] and result["layers"] == 4
    fields, tensors = contents(tmp_path / "out.gguf")
    assert tensors == contents(upstreams)[1]
    routers = load_file(recipe / "first_routers.safetensors")
    assert np.array_equal(np.float32(fields[key.ROUTER_WEIGHT]), routers["router.weight"].numpy().ravel())
    assert np.array_equal(np.float32(fields[key.ROUTER_BIAS]), routers["router.bias"].numpy())
    expected = {
        key.VERSION: 1,
        key.BLOCK_COUNT: 4,
        key.EMBEDDING_LENGTH: 64,
        key.ROUTER_NORM: "rms",
        key.ROUTER_THRESHOLD: 0.625,
        key.PREFILL: "skip",
        key.WINDOW: 99,
        key.PROTECTED: [0, 3],
        key.CALIBRATION_THRESHOLD: [0.25, 0.5],
        key.CALIBRATION_KEPT: [0.875, 0.5],
        key.LORA_MERGED: False,
        "general.tags": ["first", "layer-skipping"],
        "general.finetune": "first",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Some Model 1B",
        "general.base_model.0.organization": "some-org",
        "general.base_model.0.repo_url": "https://huggingface.co/some-org/Some-Model-1B",
    }
    assert {name: fields.get(name) for name in expected} == expected


def test_recipe_with_lora_is_merged_and_said_so(tiny_model, tmp_path):
    import peft

    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, mask=[1, 1, 1, 1])
    tiny.adapter(model, recipe, target_modules=["q_proj", "v_proj"])
    result = convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    assert result["lora"]["pairs_used"] == result["lora"]["modules"] == 8
    fields, _ = contents(tmp_path / "out.gguf")
    assert fields[key.LORA_MERGED] is True and fields[key.LORA_RANK] == 4 and fields[key.LORA_ALPHA] == 8
    assert fields[key.LORA_TARGETS] == ["q_proj", "v_proj"]
    ids = tiny.prompt()
    net = peft.PeftModel.from_pretrained(tiny.load(model), str(recipe)).eval()
    with torch.no_grad():
        truth = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert np.abs(logits(tmp_path / "out.gguf", ids) - truth).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "kept"), [("x" * 5000, "x" * 5000), ("a\0b", "a\0b"), ("\ud800", "?"), (None, None)], ids="abcd"
)
def test_any_name_of_the_adapters_base_is_only_a_name(name, kept, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=name)
    convert.convert(model, lora=adapter, outfile=tmp_path / "out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[0].get(key.RECIPE_BASE_MODEL) == kept


def test_licence_of_the_model_card_is_kept(tiny_model, tmp_path):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- tiny\n---\n# Tiny\n")
    recipe = tiny.recipe(tmp_path / "recipe", model, mask=[1, 1, 1, 1])
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    fields, _ = contents(tmp_path / "out.gguf")
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.tags"] == ["tiny", "first", "layer-skipping"]


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_goes_through(arch, tiny_model, tmp_path):
    model, upstreams = tiny_model(arch)
    recipe = tiny.recipe(tmp_path / "recipe", model)
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(upstreams)[1]


def test_config_keys_that_transformers_no_longer_writes_are_added(tmp_path):
    for arch, lost in (("gpt2", "n_ctx"), ("gptneox", "rotary_pct")):
        model = tiny.make(arch, tmp_path / arch)
        config = json.loads((model / "config.json").read_text())
        config.pop(lost)
        (model / "config.json").write_text(json.dumps(config))
        n_layer = len(tiny.layers(tiny.load(model)))
        convert.convert(model, outfile=tmp_path / f"{arch}.gguf", outtype="f32")
        ids = tiny.prompt()
        truth = tiny.gold(model, [1] * n_layer, ids)
        assert np.abs(logits(tmp_path / f"{arch}.gguf", ids) - truth).max() < 1e-4


# Whole runs of the command.


def run(*args, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "first_convert.convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", **options)


def test_command_quantises_and_reports(processes, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, mask=[1, 0, 1, 1])
    out = tmp_path / "out.gguf"
    done = run(model, "--first", recipe, "--outfile", out, "--outtype", "Q4_K_M", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bytes"] == out.stat().st_size and result["outtype"] == "q4_k_m"
    assert (
        result["fallbacks"][0]
        == {
            "tensor": "token_embd.weight",
            "columns": 64,
            "wanted": "q4_K",
            "got": "q5_0",
        }
        and result["fallback_bytes"] > 0
    )
    assert "too narrow for q4_k_m" in done.stderr
    assert all(line.startswith("first-convert: ") for line in done.stderr.splitlines())
    fields, _ = contents(out)
    assert fields[key.ROUTER_BIAS] == [10.0, -10.0, 10.0, 10.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "recipe"]


def running(folder: Path) -> list[str]:
    """Command lines of processes that work in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [line for line in [path.read_bytes().decode(errors="replace")] if str(folder) in line]
    return found


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ctrl_c_and_kill_leave_nothing_at_the_final_name(sent, code, processes, tiny_model, tmp_path):
    """At each stage of the work: the old file is intact, no process goes on, and the next run sweeps up."""
    model, _ = tiny_model("llama")
    out = tmp_path / "out [1].gguf"
    out.write_bytes(b"the old file")
    command = [sys.executable, "-m", "first_convert.convert", model, "--outfile", out, "--force"]
    for stage in ("job.json", "model.gguf", "quantised.gguf"):
        # Where the tests run in the background of a shell, children would inherit that Ctrl-C is ignored.
        reset = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, preexec_fn=reset)
        while process.poll() is None and not list(tmp_path.glob(f".out*/{stage}")):
            time.sleep(0.002)
        process.send_signal(sent)
        assert process.wait(timeout=30) == code
        assert out.read_bytes() == b"the old file"
        # A process in the middle of an exec has no command line for a moment: one look does not tell.
        looks, deadline = [True] * 5, time.monotonic() + 30
        while any(looks) and time.monotonic() < deadline:
            time.sleep(0.1)
            looks = [*looks[1:], bool(running(tmp_path))]
        assert not any(looks), running(tmp_path)
        assert len(list(tmp_path.glob(".out*"))) == (sent == signal.SIGKILL)
    assert run(*command[3:]).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out [1].gguf"]
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of some KB."""
    made = []

    def make(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{kilobytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        if subprocess.run(list(map(str, command)), capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


BLIND = """
import shutil, sys
from first_convert.convert import main
real = shutil.disk_usage
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kilobytes", [4, 300, 900])
def test_disk_that_fills_up_is_said_and_left_empty(kilobytes, processes, small_disk, tiny_model):
    """While the job, the converted or the quantised file is written; somebody else took the space meanwhile."""
    model, _ = tiny_model("llama")
    folder = small_disk(kilobytes)
    command = [sys.executable, "-c", BLIND, model, "--outfile", folder / "out.gguf", "--outtype", "q8_0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "No space left" in done.stderr or "disk full" in done.stderr
    assert list(folder.iterdir()) == []


def test_file_size_limit_is_said_and_leaves_nothing(processes, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    limit = "ulimit -f 200; exec "
    command = [sys.executable, "-m", "first_convert.convert", model, "--outfile", tmp_path / "out.gguf"]
    text = limit + " ".join(f"'{part}'" for part in command)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.returncode == 2 and ("File too large" in done.stderr or "disk full" in done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_work(tiny_model, tmp_path, monkeypatch, capsys):
    model, _ = tiny_model("llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    assert main([str(model), "--outfile", str(tmp_path / "out.gguf")]) == 2
    assert "needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [{}, {"hidden_size": 100, "head_dim": 16}, {"hidden_size": 256}])
def test_estimate_is_never_below_what_is_written(rows, tmp_path, monkeypatch):
    """For every type, with rows that fit its blocks and rows that do not."""
    model = tiny.make("llama", tmp_path / "hf", num_hidden_layers=1, intermediate_size=512, **rows)
    base = tiny.gguf(model, tmp_path / "base.gguf")
    monkeypatch.setattr(convert, "_KEYS", 20_000)  # vocabulary and keys of the tiny model
    out = tmp_path / "out.gguf"
    written = 0
    for kind in quantize.TYPES:
        out.unlink(missing_ok=True)
        plan = convert.convert(model, outfile=out, outtype=kind, dry_run=True)
        with contextlib.suppress(InputError):  # types that need an importance matrix
            quantize.quantize(base, out, kind)
            assert out.stat().st_size <= plan["output_at_most"] <= plan["disk_needed"], kind
            written += 1
    assert written > 20


def test_folder_that_cannot_be_written_is_named(tiny_model, tmp_path, monkeypatch, capsys):
    def refuse(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(options["dir"]))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    text = refused(capsys, tmp_path / "out.gguf", tiny_model("llama")[0])
    assert str(tmp_path) in text and "Read-only file system" in text


def test_devices_are_never_replaced(tiny_model, capsys):
    before = os.stat("/dev/null")
    text = refused(capsys, Path("/dev/null"), tiny_model("llama")[0], "--force")
    assert "not a regular file" in text and os.stat("/dev/null").st_rdev == before.st_rdev


def test_progress_shows_bytes_and_the_time_left(processes, tiny_model, tmp_path):
    """On a terminal, for converting, checking, quantising and copying."""
    import fcntl
    import pty
    import struct
    import termios

    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    lines = ""
    for args in ((model, "--outfile", tmp_path / "a.gguf"), ("--base-gguf", base, "--first", recipe)):
        command = [sys.executable, "-m", "first_convert.convert", *args, "--outfile", tmp_path / f"{len(lines)}.gguf"]
        terminal, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        process = subprocess.Popen(list(map(str, command)), stderr=other)
        os.close(other)
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while data := os.read(terminal, 4096):
                lines += data.decode(errors="replace")
        os.close(terminal)
        assert process.wait() == 0, lines
    for what in ("Writing", "Checking", "Quantising", "Copying"):
        assert re.search(rf"{what}: .*[kM]?/[\d.]+[kM].*\[\d\d:\d\d<.*[bB](yte)?/s\]", lines), (what, lines)


def test_locale_and_odd_paths_change_nothing(processes, tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    plain = tiny.recipe(tmp_path / "plain", model)
    tiny.adapter(model, plain, target_modules=["q_proj"])
    convert.convert(model, first=plain, outfile=tmp_path / "plain.gguf")
    wanted_fields, wanted = contents(tmp_path / "plain.gguf")
    odd = tmp_path / "T64 копия" / "モデル v1"
    copy_of(model, odd)
    recipe = copy_of(plain, odd.parent / "recette é'1")
    os.symlink(odd, tmp_path / "link")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    runs = ((f"{odd}/", tmp_path), (".", odd), (tmp_path / "link", tmp_path))
    for i, (source, cwd) in enumerate(runs):
        out = tmp_path / f"вывод {i}.gguf"
        done = run(source, "--first", recipe, "--outfile", out, env=environment, cwd=cwd)
        assert done.returncode == 0, done.stderr
        fields, tensors = contents(out)
        differing = {name for name in fields | wanted_fields if fields.get(name) != wanted_fields.get(name)}
        allowed = {"general.name", "general.basename", "general.version", "first.recipe.name"}
        assert tensors == wanted and differing <= allowed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such names")
def test_names_at_the_limit_of_the_file_system(tiny_model, tmp_path):
    """A model folder that is not UTF-8, and files of 255 bytes whose characters have 1 or 4."""
    odd = copy_of(tiny_model("llama")[0], Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff")))
    for name in ("y" * 250 + ".gguf", "🦙" * 62 + "yy.gguf"):
        convert.convert(odd, outfile=tmp_path / name, outtype="f32")
        found = contents(tmp_path / name)
        assert found[0]["general.name"] == "Bad\ufffd" and found[1] == contents(tiny_model("llama")[1])[1]
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == [odd]


# Wrong input: one line, exit code 2, nothing written.


def refused(capsys, out: Path, *args) -> str:
    before = sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None
    assert main([*map(str, args), "--outfile", str(out)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1 and captured.out == ""
    assert before == (sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None)
    return lines[0]


def test_recipe_of_another_shape(tiny_model, tmp_path, capsys):
    model, base = tiny_model("llama")
    for change, numbers in (({"num_hidden_layers": 6}, ("4", "6")), ({"hidden_size": 96}, ("64", "96"))):
        other = tiny.make("llama", tmp_path / "other", **change)
        recipe = tiny.recipe(tmp_path / "recipe", other)
        for source in ([model], ["--base-gguf", base]):
            text = refused(capsys, tmp_path / "out.gguf", *source, "--first", recipe)
            assert all(number in text for number in numbers)


def test_broken_routers(tiny_model, tmp_path, capsys):
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    path = recipe / "first_routers.safetensors"
    good = load_file(path)
    bad = {
        "is missing": {"router.bias": good["router.bias"]},
        "NaN": {**good, "router.weight": good["router.weight"].clone().fill_(float("nan"))},
        "infinity": {**good, "router.bias": torch.full((4,), float("inf"))},
        "[3, 64]": {**good, "router.weight": good["router.weight"][:3].clone()},
        "unexpected": {**good, "router.extra": torch.zeros(1)},
        "is bf16, expected float32": {name: tensor.bfloat16() for name, tensor in good.items()},
        "is f8_e4m3, expected float32": {name: tensor.to(torch.float8_e4m3fn) for name, tensor in good.items()},
    }
    for word, tensors in bad.items():
        save_file(tensors, path)
        assert word in refused(capsys, tmp_path / "out.gguf", model, "--first", recipe)
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert path.name in refused(capsys, tmp_path / "out.gguf", model, "--first", recipe)
    path.unlink()
    assert path.name in refused(capsys, tmp_path / "out.gguf", model, "--first", recipe)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model", 5),
        ("window", 2**40),
        ("calibration", {"threshold": [0.5], "kept": [1e300]}),
        ("calibration", {"threshold": [10**400], "kept": [0.5]}),
        ("calibration", {"threshold": [True], "kept": [0.5]}),
        ("training", {"options": 5}),
        ("threshold", True),
        ("threshold", 10**400),
        ("version", True),
        ("version", 1.0),
        ("protected", [0, 0]),
        ("base_model", "\ud800"),
    ],
)
def test_a_damaged_recipe_is_one_line(name, value, tiny_model, tmp_path, capsys):
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    edit_json(recipe / "first_config.json", **{name: value})
    text = refused(capsys, tmp_path / "out.gguf", model, "--first", recipe)
    assert f"first_config.json: '{name}' is" in text


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ('"training": ' + "[" * 200_000, "recursion"),
        ('"window": ' + "9" * 5000, "digits"),
        ('"threshold": 0.25, "threshold": 0.75', "'threshold' is there twice"),
        ('"training": {"steps": 1, "steps": 1}', "'steps' is there twice"),
    ],
    ids=["deep", "long", "twice", "twice inside"],
)
def test_a_recipe_that_json_cannot_tell_is_named(added, words, tiny_model, tmp_path, capsys):
    model, _ = tiny_model("llama")
    path = tiny.recipe(tmp_path / "recipe", model) / "first_config.json"
    path.write_text(f'{{"version": 1, "block_count": 4, "embedding_length": 64, {added}}}')
    text = refused(capsys, tmp_path / "out.gguf", model, "--first", path.parent)
    assert f"{path}: not valid JSON" in text and words in text


def test_wrong_arguments(tiny_model, tmp_path, capsys):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    out = tmp_path / "out.gguf"
    assert "unknown outtype 'q9_9'" in refused(capsys, out, model, "--outtype", "q9_9")
    assert "exactly one" in refused(capsys, out)
    assert "exactly one" in refused(capsys, out, model, "--base-gguf", base)
    assert "stay as is" in refused(capsys, out, "--base-gguf", base, "--first", recipe, "--outtype", "q8_0")
    assert "needs --first" in refused(capsys, out, "--base-gguf", base)
    assert "give one of them" in refused(capsys, out, "--strip", base, "--first", recipe)
    assert "--threads" in refused(capsys, out, model, "--threads", "-1")
    assert "no such directory" in refused(capsys, tmp_path / "missing" / "out.gguf", model)
    assert "a directory" in refused(capsys, recipe, model)
    assert main([str(model)]) == 2 and "--outfile" in capsys.readouterr().err
    out.write_bytes(b"old")
    assert "--force" in refused(capsys, out, model)
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "first_config.json", "adapter_config.json", "im.gguf"]
)
def test_an_input_is_never_replaced(name, tiny_model, tmp_path, capsys):
    model, recipe = copy_of(tiny_model("llama")[0], tmp_path / "hf"), tmp_path / "recipe"
    tiny.adapter(model, tiny.recipe(recipe, model), target_modules=["q_proj"])
    (tmp_path / "im.gguf").write_bytes(b"x")
    (tmp_path / "link").symlink_to(next(tmp_path.rglob(name)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    options = (
        model,
        "--first",
        recipe,
        "--outtype",
        "q4_0",
        "--force",
        *(("--imatrix", tmp_path / "im.gguf") * (name == "im.gguf")),
    )
    for out in (next(tmp_path.rglob(name)), tmp_path / "link"):
        assert "is read, so it cannot be written to" in refused(capsys, out, *options)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_folders_that_are_not_models(tiny_model, tmp_path, capsys):
    model, base = tiny_model("llama")
    out = tmp_path / "out.gguf"
    recipe = tiny.recipe(tmp_path / "recipe", model)
    adapter = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    assert "--lora" in refused(capsys, out, adapter)
    assert "--first" in refused(capsys, out, recipe)
    assert "--base-gguf" in refused(capsys, out, base)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(capsys, out, tmp_path / "empty")
    assert "no such folder" in refused(capsys, out, tmp_path / "nowhere")
    assert "no adapter_config.json" in refused(capsys, out, model, "--lora", recipe)
    both = tiny.recipe(tmp_path / "both", model)
    tiny.adapter(model, both, target_modules=["q_proj"])
    assert "brings its own LoRA" in refused(capsys, out, model, "--first", both, "--lora", adapter)
    (both / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: not found" in refused(capsys, out, model, "--first", both)


def test_quantised_base_is_refused(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    edit_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "unquantised" in refused(capsys, tmp_path / "out.gguf", model)


def test_unknown_architecture_is_named(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    edit_json(model / "config.json", architectures=["NobodyForCausalLM"])
    assert "NobodyForCausalLM is not supported" in refused(capsys, tmp_path / "out.gguf", model)


def test_a_number_that_ends_llama_cpp_is_refused(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    edit_json(model / "config.json", rms_norm_eps=-1.5)
    text = refused(capsys, tmp_path / "out.gguf", model, "--outtype", "f32")
    assert f"{model}: the key 'llama.attention.layer_norm_rms_epsilon' is -1.5" in text


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("num_hidden_layers", 2**31, "whole number"),
        ("num_hidden_layers", True, "whole number"),
        ("vocab_size", 2**31, "whole number"),
        ("hidden_size", "64", "whole number"),
        ("architectures", None, "LlamaForCausalLM"),
        ("architectures", [1], "LlamaForCausalLM"),
        ("text_config", "x", "an object"),
        ("num_key_value_heads", 1.5, "expected int"),
        ("rope_parameters", "x", "rope_parameters"),
        ("hidden_act", "relu", "'silu'"),
        ("hidden_act", "gelu", "'silu'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(key, value, words, tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    edit_json(model / "config.json", **{key: value})
    text = refused(capsys, tmp_path / "out.gguf", model)
    assert f"{model / 'config.json'}: " in text and key in text and words in text


@pytest.mark.parametrize("key, value", [("num_key_value_heads", 0), ("head_dim", -1)])
def test_where_upstreams_converter_fails_the_model_is_named(key, value, tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    edit_json(model / "config.json", **{key: value})
    assert f"{model}: llama.cpp's converter" in refused(capsys, tmp_path / "out.gguf", model)


@pytest.mark.parametrize(
    "arch, key, value",
    [("llama", "hidden_act", "swish"), ("gemma3", "hidden_act", "gelu"), ("gptneox", "hidden_act", "gelu_fast")],
)
def test_another_name_of_the_same_activation_is_fine(arch, key, value, tiny_model, tmp_path):
    model = copy_of(tiny_model(arch)[0], tmp_path / "hf")
    edit_json(model / "config.json", **{key: value})
    convert.convert(model, outfile=tmp_path / "out.gguf", outtype="f32")


def test_more_tokens_than_embeddings_are_refused_with_both_numbers(tiny_model, tmp_path, capsys):
    from transformers import AutoTokenizer

    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<new{i}>" for i in range(400 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    text = refused(capsys, tmp_path / "out.gguf", model)
    assert str(model) in text and "400 tokens" in text and "384 rows" in text


def test_prompts_of_a_recipe_end_without_eos(tiny_model, tmp_path):
    """Where the tokenizer puts one behind every text, the runtime feeds what training saw."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(model)
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    added = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = added
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    out = tmp_path / "out.gguf"
    convert.convert(model, first=tiny.recipe(tmp_path / "recipe", model), outfile=out, outtype="f32")
    llm = FirstLlama(str(out), n_ctx=64, verbose=False)
    fed = llm.tokenize(b"the quick", True, True)
    llm.close()
    assert fed == encode(AutoTokenizer.from_pretrained(model), "the quick", "fox")[0]
    assert fed[0] == 1 and fed[-1] != 2


def test_a_model_folder_with_a_lora_inside_is_refused_until_one_is_named(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    adapter = tiny.adapter(model, tmp_path / "lora", target_modules=["q_proj"])
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, model / path.name)
    text = refused(capsys, tmp_path / "out.gguf", model)
    assert "adapter_config.json" in text and f"--lora {model}" in text
    recipe = tiny.recipe(tmp_path / "recipe", model)
    for more in ((), ("--lora", adapter), ("--first", shutil.copytree(adapter, recipe, dirs_exist_ok=True))):
        assert "holds a LoRA too" in refused(capsys, tmp_path / "out.gguf", model, *more)
    assert convert.convert(model, lora=model, outfile=tmp_path / "out.gguf", outtype="f32")["lora"]["pairs_used"] == 4


def test_missing_parts_of_a_checkpoint_are_named(tiny_model, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    path = model / "model.safetensors"
    good = load_file(path)

    def without(name, **more):
        tensors = {key: tensor for key, tensor in good.items() if key != name}
        save_file({**tensors, **more}, path, {"format": "pt"})
        return refused(capsys, out, model)

    assert "lm_head.weight" in without("lm_head.weight")  # llama.cpp would run it with the embeddings
    assert "blk.2.ffn_up.weight" in without("model.layers.2.mlp.up_proj.weight")
    assert "blk.2.ffn_up.weight" in without("", **{"model.layers.2.mlp.up_proj.weight": torch.zeros(128, 32)})
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n")
    assert path.name in refused(capsys, out, model)
    save_file(good, path, {"format": "pt"})
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refused(capsys, out, model)


def test_tokenizer_json_alone_is_enough(tiny_model, tmp_path):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    (model / "tokenizer_config.json").unlink()
    convert.convert(model, outfile=tmp_path / "out.gguf", outtype="f32")
    texts = [tiny.TEXT[i : i + 40] for i in range(0, 200, 8)]
    assert check.loads(tmp_path / "out.gguf", [(text, tiny.tokenizer().encode(text)) for text in texts]) == []


@pytest.mark.parametrize("data", [b"", b"null", b"\xef\xbb\xbf{}", b'{"a": "b', b"[" * 200_000], ids="abcde")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(name, data, tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    (model / name).write_bytes(data)
    assert f"{model / name}: " in refused(capsys, tmp_path / "out.gguf", model)


def test_a_missing_sentencepiece_model_is_no_full_disk(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("gemma2")[0], tmp_path / "hf")
    (model / "tokenizer.model").unlink()
    text = refused(capsys, tmp_path / "out.gguf", model)
    assert "tokenizer.model" in text and "disk" not in text


# Shards.


@pytest.fixture
def sharded(tiny_model, tmp_path):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    (model / "model.safetensors").unlink()
    tiny.load(tiny_model("llama")[0]).save_pretrained(model, max_shard_size="200KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    return model


def test_sharded_equals_whole(sharded, tiny_model, tmp_path):
    convert.convert(sharded, outfile=tmp_path / "out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(tiny_model("llama")[1])[1]


def test_incomplete_shards_are_named(sharded, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    second = sorted(sharded.glob("model-*.safetensors"))[1]
    data = second.read_bytes()
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    second.write_bytes(data[:-100])
    assert second.name in refused(capsys, out, sharded)
    second.write_bytes(data[:4])
    assert second.name in refused(capsys, out, sharded)
    second.unlink()
    assert second.name in refused(capsys, out, sharded)
    index.rename(tmp_path / "index")
    assert "shards found" in refused(capsys, out, sharded)
    (tmp_path / "index").rename(index)
    second.write_bytes(data)
    stale = {n: f.replace("-of-00", "-of-01") for n, f in good["weight_map"].items()}
    edit_json(index, weight_map=stale)
    assert "-of-01" in refused(capsys, out, sharded)
    edit_json(index, weight_map={**good["weight_map"], "model.ghost.weight": second.name})
    text = refused(capsys, out, sharded)
    assert "model.ghost.weight" in text and second.name in text
    edit_json(index, weight_map={"model.norm.weight": 5})
    assert index.name in refused(capsys, out, sharded)
    index.write_text("{")
    assert index.name in refused(capsys, out, sharded)


@pytest.mark.parametrize("stray", ["model_backup", "model2", "model-00001-of-00002", "model.fp16"])
@pytest.mark.parametrize("lora", [False, True])
def test_other_weights_in_the_folder_are_not_the_model(lora, stray, sharded, tiny_model, tmp_path):
    """transformers reads model.safetensors, whatever index, shards or copies lie beside it."""
    whole = tiny_model("llama")[0] / "model.safetensors"
    adapter = tiny.adapter(tiny_model("llama")[0], tmp_path / "lora", target_modules=["q_proj"]) if lora else None
    other = {key: tensor + 1 for key, tensor in load_file(whole).items()}
    for path in sharded.glob("model-*.safetensors"):
        save_file({key: other[key] for key in load_file(path)}, path, {"format": "pt"})
    save_file(other, sharded / f"{stray}.safetensors", {"format": "pt"})
    shutil.copy(whole, sharded / "model.safetensors")
    for name, model in (("right", tiny_model("llama")[0]), ("got", sharded)):
        convert.convert(model, lora=adapter, outfile=tmp_path / f"{name}.gguf", outtype="f32")
    assert contents(tmp_path / "got.gguf")[1] == contents(tmp_path / "right.gguf")[1]


def test_a_tensor_in_two_shards_or_in_none_by_the_index_is_refused(sharded, tmp_path, capsys):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    index, good = sharded / "model.safetensors.index.json", load_file(second)
    save_file({**good, "ghost": torch.ones(2)}, second, {"format": "pt"})
    text = refused(capsys, tmp_path / "out.gguf", sharded)
    assert "ghost" in text and second.name in text and index.name in text
    name, tensor = next(iter(load_file(first).items()))
    save_file({**good, name: tensor + 1}, second, {"format": "pt"})
    for _ in range(2):
        text = refused(capsys, tmp_path / "out.gguf", sharded)
        assert name in text and first.name in text and second.name in text
        index.unlink(missing_ok=True)


@pytest.mark.parametrize("stray", ["pytorch_model_backup.bin", "pytorch_model-00001-of-00002.bin"])
def test_other_torch_weights_in_the_folder_are_refused(stray, tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    torch.save(tensors, model / stray)
    text = refused(capsys, tmp_path / "out.gguf", model)
    assert stray in text and "pytorch_model.bin" in text


# Tied heads.


def test_tied_head_is_stored_once_also_when_the_checkpoint_repeats_it(tiny_model, tmp_path, capsys):
    model, upstreams = tiny_model("llama-tied")
    twice = copy_of(model, tmp_path / "twice")
    tensors = load_file(model / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, twice / "model.safetensors")
    convert.convert(twice, outfile=tmp_path / "out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(upstreams)[1]
    save_file({**tensors, "lm_head.weight": embeddings + 1}, twice / "model.safetensors")
    text = refused(capsys, tmp_path / "other.gguf", twice)
    assert "tie_word_embeddings" in text and "lm_head.weight" in text


# Vocabularies.


def test_added_tokens_have_the_ids_of_transformers(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.add_tokens(["foobar", "<think>"])
    tokenizer.save_pretrained(model)
    net = tiny.load(model)
    net.resize_token_embeddings(tiny.VOCAB + 3)
    net.save_pretrained(model)
    convert.convert(model, outfile=tmp_path / "out.gguf", outtype="f32")
    texts = [tiny.TEXT[i : i + 40] for i in range(0, 200, 8)]
    texts += [f"a{new} b{new}{text[:7]}" for new in ("<|tool|>", "foobar", "<think>") for text in texts[:9]]
    assert len(texts) > 50
    probes = [(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert check.loads(tmp_path / "out.gguf", probes) == []
    fields, tensors = contents(tmp_path / "out.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == tiny.VOCAB + 3
    stored = np.frombuffer(tensors["token_embd.weight"][1], np.float32).reshape(-1, 64)
    assert np.array_equal(stored, net.get_input_embeddings().weight.detach().numpy())


def test_changed_pre_tokenizer_is_refused_or_named_by_the_user(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": False}, tokenizer["pre_tokenizer"]],
    }
    path.write_text(json.dumps(tokenizer))
    out = tmp_path / "out.gguf"
    assert "--pre-tokenizer" in refused(capsys, out, model)
    assert "other tokens" in refused(capsys, out, model, "--pre-tokenizer", "deepseek-llm")


# Values that do not fit.


def test_overflow_of_f16_is_refused_and_wider_types_keep_the_value(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    text = refused(capsys, tmp_path / "out.gguf", model, "--outtype", "f16")
    assert "blk.1.ffn_up.weight" in text and "bf16" in text
    ids = tiny.prompt()
    truth = tiny.gold(model, [1] * 4, ids)
    convert.convert(model, outfile=tmp_path / "f32.gguf", outtype="f32")
    assert np.abs(logits(tmp_path / "f32.gguf", ids) - truth).max() < 1e-4
    for kind in ("bf16", "q8_0"):
        convert.convert(model, outfile=tmp_path / f"{kind}.gguf", outtype=kind)
        assert np.isfinite(logits(tmp_path / f"{kind}.gguf", ids)).all()


@pytest.mark.parametrize("kind, value", [("q8_0", 1e7), ("q4_0", 1e6), ("q6_k", 1e7)])
def test_overflow_of_a_scale_is_refused_by_name(kind, value, tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "blk.1.ffn_up.weight" in refused(capsys, tmp_path / "out.gguf", model, "--outtype", kind)


def test_overflow_that_an_adapter_makes_is_refused_by_name(tiny_model, tmp_path, capsys):
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "a", spread=400, target_modules=["q_proj"])
    text = refused(capsys, tmp_path / "out.gguf", model, "--lora", adapter, "--outtype", "f16")
    assert "attn_q.weight" in text and "bf16" in text
    convert.convert(model, lora=adapter, outfile=tmp_path / "out.gguf", outtype="bf16")


def test_large_router_bias_is_stored_as_it_is(tiny_model, tmp_path):
    model, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, bias=np.array([1e5, -1e5, 1e30, 0], np.float32))
    convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "out.gguf")
    found = np.float32(contents(tmp_path / "out.gguf")[0][key.ROUTER_BIAS])
    assert np.array_equal(found, np.array([1e5, -1e5, 1e30, 0], np.float32))


def test_verbose_shows_where_the_quantiser_failed(tmp_path, capfd, processes):
    model = tiny.make("llama", tmp_path / "hf", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    args = [str(model), "--outfile", str(tmp_path / "out.gguf"), "--outtype", "iq1_s", "--verbose"]
    assert main(args) == 2
    err = capfd.readouterr().err
    assert "quantize.py" in err and "needs --imatrix" in err.splitlines()[-1]


def test_nan_in_the_source_is_named(tiny_model, tmp_path, capsys):
    model = copy_of(tiny_model("llama")[0], tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for kind in ("f32", "q8_0"):
        text = refused(capsys, tmp_path / "out.gguf", model, "--outtype", kind)
        assert "blk.2.attn_v.weight" in text


def test_merge_comes_before_quantising(tiny_model, tmp_path):
    """Deltas too small for the steps of q4_0 reach the float32 file exactly."""
    model, _ = tiny_model("llama")
    adapter = tiny.adapter(model, tmp_path / "a", spread=1e-2, target_modules=["q_proj"])
    result = convert.convert(model, lora=adapter, outfile=tmp_path / "f32.gguf", outtype="f32")
    assert result["lora"]["pairs_used"] == 4
    convert.convert(model, lora=adapter, outfile=tmp_path / "q4.gguf", outtype="q4_0")
    quantize.quantize(tmp_path / "f32.gguf", tmp_path / "again.gguf", "q4_0")
    assert contents(tmp_path / "q4.gguf")[1] == contents(tmp_path / "again.gguf")[1]


def test_dry_run_writes_nothing(tiny_model, tmp_path, capsys):
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    tiny.adapter(model, recipe, target_modules=["q_proj"])
    before = sorted(tmp_path.rglob("*"))
    args = [str(model), "--first", str(recipe), "--outfile", str(tmp_path / "o.gguf"), "--dry-run", "--json"]
    assert main(args) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["lora"]["pairs"] == 4 and plan["intermediate"] == "f32"
    assert plan["disk_free"] > plan["disk_needed"] > plan["output_at_most"] > 0
    assert plan["model"] == str(model) and plan["recipe"] == str(recipe) and plan["lora_dir"] == str(recipe)
    assert main(args[:-1]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (f"model: {model}", "'pairs': 4", "output_at_most: ", " MB"))
    base = tiny_model("llama")[1]
    assert main(["--strip", str(base), "--outfile", str(tmp_path / "o.gguf"), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_local_folders_never_touch_the_network(tiny_model, tmp_path, monkeypatch):
    import socket

    def refuse(*args):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, base_model="some-org/some-model")
    tiny.adapter(model, recipe, target_modules=["q_proj"])
    edit_json(recipe / "adapter_config.json", base_model_name_or_path="some-org/some-model")
    convert.convert(model, first=recipe, outfile=tmp_path / "out.gguf", outtype="f32")
    fields, _ = contents(tmp_path / "out.gguf")
    assert fields["general.base_model.0.organization"] == "some-org"


def test_whole_command_makes_no_connection(processes, tiny_model, tmp_path):
    """Names of the Hub in recipe and adapter, children included; a proxy would see any attempt."""
    import socket

    model, _ = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model, base_model="some-org/some-model")
    tiny.adapter(model, recipe, target_modules=["q_proj"])
    edit_json(recipe / "adapter_config.json", base_model_name_or_path="some-org/some-model")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"), address)
        done = run(model, "--first", recipe, "--outfile", tmp_path / "out.gguf", env=environment)
        assert done.returncode == 0, done.stderr
        proxy.settimeout(0.1)
        with pytest.raises(TimeoutError):
            proxy.accept()


def test_hub_names_come_from_the_cache_when_offline(tiny_model, tmp_path):
    """The Hub's own client, with a cache that an earlier download left."""
    model, upstreams = tiny_model("llama")
    snapshots = tmp_path / "hub" / "models--some--model" / "snapshots"
    snapshots.mkdir(parents=True)
    copy_of(model, snapshots / ("a" * 40))
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("a" * 40)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    out = tmp_path / "out.gguf"
    done = run("some/model", "--outfile", out, "--outtype", "f32", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(out)[1] == contents(upstreams)[1]
    done = run("some/other", "--outfile", tmp_path / "other.gguf", env=environment, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "some/other: no such folder" in lines[0]


def test_python_call_raises_what_the_command_prints(tiny_model, tmp_path):
    with pytest.raises(InputError, match="unknown outtype"):
        convert.convert(tiny_model("llama")[0], outfile=tmp_path / "o.gguf", outtype="q9")


def test_hub_names_are_fetched_and_folders_are_not(tiny_model, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    model, upstreams = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    lora = tiny.adapter(model, tmp_path / "lora", target_modules=["q_proj"])
    binary = copy_of(model, tmp_path / "binary")
    torch.save(load_file(binary / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    asked = []

    def snapshot_download(name, allow_patterns=None):
        asked.append(name)
        if name == "some/nothing":
            raise OSError("404 Client Error")
        if name == "some/binary" and "pytorch_model*.bin" in allow_patterns:
            shutil.copy(tmp_path / "pytorch_model.bin", binary)
        folders = {"some/model": model, "some/recipe": recipe, "some/lora": lora, "some/binary": binary}
        return str(folders[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    convert.convert("some/model", first="some/recipe", outfile="out.gguf", outtype="f32")
    assert contents(tmp_path / "out.gguf")[1] == contents(upstreams)[1] and len(asked) == 2
    convert.convert("some/model", lora="some/lora", outfile="lora.gguf", outtype="f32")
    convert.convert("some/binary", outfile="binary.gguf", outtype="f32")
    assert contents(tmp_path / "binary.gguf")[1] == contents(upstreams)[1]
    assert "404" in refused(capsys, tmp_path / "other.gguf", "some/nothing")
    asked.clear()
    convert.convert(model, first="recipe", outfile="third.gguf", outtype="f32")
    assert not asked


def test_result_that_llama_cpp_cannot_load_is_never_published(tmp_path, capsys):
    model = tiny.make("gemma3", tmp_path / "hf")
    tiny.tokenizer().save_pretrained(model)  # 377 tokens: upstream cuts the 384 embeddings to 380
    text = refused(capsys, tmp_path / "out.gguf", model)
    assert "does not load the result" in text and "token_embd.weight" in text


PEAK = """
import resource, sys
from first_convert.convert import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_layers(processes, tmp_path):
    """Sharded bfloat16 models of 4 and 12 layers of 10 MB; the peak of the largest process, in MB."""
    peaks = []
    for layers in (4, 12):
        model = tmp_path / f"hf{layers}"
        tiny.make("llama", model, num_hidden_layers=layers, hidden_size=1024, intermediate_size=1024, head_dim=256)
        recipe = tiny.recipe(tmp_path / f"recipe{layers}", model)
        tiny.adapter(model, recipe)
        net = tiny.load(model).to(torch.bfloat16)
        (model / "model.safetensors").unlink()
        net.save_pretrained(model, max_shard_size="20MB")
        out = tmp_path / f"{layers}.gguf"
        command = [sys.executable, "-c", PEAK, model, "--first", recipe, "--outfile", out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    grown = (tmp_path / "12.gguf").stat().st_size - (tmp_path / "4.gguf").stat().st_size
    assert grown > 30e6  # as q8_0; the merged weights of the difference take four times that
    assert peaks[1] - peaks[0] < 60, peaks


def test_architecture_that_cannot_route_is_refused_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, "mamba", ("mamba", {"state_size": 16}))
    model = tiny.make("mamba", tmp_path / "hf")
    recipe = tiny.recipe(tmp_path / "recipe", model)
    text = refused(capsys, tmp_path / "out.gguf", model, "--first", recipe)
    assert "routing is not supported for 'mamba'" in text and "--allow-dense" in text
    args = [model, "--first", recipe, "--outfile", tmp_path / "out.gguf", "--outtype", "f32"]
    assert main([*map(str, args), "--allow-dense"]) == 0
    assert "warning: " in capsys.readouterr().err and (tmp_path / "out.gguf").exists()
