"""python -m pyfirst: where the library is, and what a file says of itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from first_convert import convert
from first_convert.ggufio import Gguf, rewrite
from pyfirst import native
from pyfirst.__main__ import main


def test_lib_path_is_a_folder_that_llama_cpp_loads(capsys):
    assert main(["lib-path"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == native.lib_dir() and list(folder.glob("*llama.*"))
    # A program that knows nothing of pyfirst gets the patched library by one variable.
    code = "import llama_cpp; print(llama_cpp.llama_cpp._lib.llama_first_api_version())"
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).stdout.strip() == b"1"


def test_info_of_a_file_without_routers(tiny_model, capsys):
    path = tiny_model("llama")[1]
    assert main(["info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["layers"], found["width"]) == ("llama", 4, tiny.WIDTH)
    assert found["context_length"] == 512 and found["tensor_type"] == "f32"
    assert found["routers"] is False and found["first"] is None
    assert main(["info", str(path)]) == 0
    assert "no; the file runs dense" in capsys.readouterr().out


def test_info_of_routers_and_their_origin(tiny_model, tmp_path, capsys):
    folder = tiny_model("llama")[0]
    recipe = tiny.recipe(
        tmp_path / "recipe",
        folder,
        router_norm="rms",
        threshold=0.25,
        prefill="skip",
        window=77,
        protected=[0, 3],
        base_model="someone/some-base",
        calibration={"threshold": [0.25, 0.5], "kept": [0.75, 0.5]},
    )
    tiny.adapter(folder, recipe)
    out = tmp_path / "with Łora.gguf"
    convert.convert(folder, first=recipe, outfile=out, outtype="f32")
    assert main(["info", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["routers"] is True
    assert found["base_models"][0]["repo_url"] == "https://huggingface.co/someone/some-base"
    first = found["first"]
    assert (first["norm"], first["threshold"], first["prefill"], first["window"]) == ("rms", 0.25, "skip", 77)
    assert first["protected"] == [0, 3]
    assert first["calibration"] == {"threshold": [0.25, 0.5], "kept": [0.75, 0.5]}
    assert first["lora_merged"] and (first["lora"]["rank"], first["lora"]["alpha"]) == (4, 8.0)
    assert "q_proj" in first["lora"]["targets"]

    assert main(["info", str(out)]) == 0
    text = capsys.readouterr().out
    for expected in ("rms", "0.25", "77 tokens", "0, 3", "75% kept at 0.25, 50% kept at 0.5", "rank 4, alpha 8"):
        assert expected in text

    rewrite(Gguf(out), tmp_path / "broken.gguf", [], lambda name: name != "first.version")
    assert main(["info", str(tmp_path / "broken.gguf")]) == 0
    text = capsys.readouterr().out
    assert "broken, first.version is missing" in text and "dense" not in text


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "cut"])
def test_info_of_what_is_no_gguf_is_one_line(kind, tiny_model, tmp_path, capfd):
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        whole = tiny_model("llama")[1].read_bytes()
        path.write_bytes({"text": b"hello, world\n" * 9, "empty": b"", "cut": whole[:3000]}[kind])
    assert main(["info", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err


def refused(module: str, *options: object, **env: str) -> str:
    """The one line of a command that finds its input wrong."""
    command = [sys.executable, "-m", module, *map(str, options)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    said = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    return said[0]


@pytest.mark.parametrize("kind", ["empty name", "no folder", "no library", "no ELF", "another library"])
def test_a_wrong_library_path_is_named(kind, tmp_path):
    folder = tmp_path / "lib"
    if kind != "no folder":
        folder.mkdir()
    if kind == "no ELF":
        (folder / "libllama.so").write_text("text")
    elif kind == "another library":
        shutil.copy(next(native.lib_dir().glob("libggml-base.*")), folder / "libllama.so")
    variable = "" if kind == "empty name" else str(folder)
    said = refused("pyfirst", "lib-path", LLAMA_CPP_LIB_PATH=variable)
    if kind in ("no ELF", "another library"):
        assert f"{folder}: llama-cpp-python cannot use this library (" in said
    else:
        assert f"LLAMA_CPP_LIB_PATH is '{variable}', expected a folder with " in said


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("pyfirst.cli.bench", ("-m", "MODEL", "--predict", "pi5")),
        ("pyfirst.cli.eval", ("-m", "MODEL", "--data", "MODEL")),
        ("pyfirst.cli.inspect", ("MODEL",)),
        ("pyfirst.cli.run", ("-m", "MODEL", "-p", "a")),
        ("pyfirst.cli.serve", ("-m", "MODEL")),
        ("first_convert.convert", ("--strip", "MODEL", "--outfile", "OUT")),
    ],
)
def test_commands_say_in_one_line_that_the_library_is_not_usable(module, options, tiny_model, tmp_path):
    words = {"MODEL": tiny_model("llama")[1], "OUT": tmp_path / "out.gguf"}
    env = {"LLAMA_CPP_LIB_PATH": str(tmp_path)}
    assert f"LLAMA_CPP_LIB_PATH is '{tmp_path}'" in refused(module, *(words.get(o, o) for o in options), **env)
    command = [sys.executable, "-m", module, "--help"]
    assert subprocess.run(command, env={**os.environ, **env}, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("module", "options", "package", "extra"),
    [
        ("first_convert.convert", ("MODEL", "--outfile", "OUT"), "torch", "convert"),
        ("pyfirst.training.train", ("-m", "MODEL", "--data", "DATA", "--out", "OUT"), "torch", "train"),
        ("pyfirst.cli.serve", ("-m", "GGUF"), "uvicorn", "server"),
    ],
)
def test_a_missing_package_names_the_extra_that_brings_it(module, options, package, extra, tiny_model, tmp_path):
    (tmp_path / f"{package}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    )
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    words = {"OUT": tmp_path / "out", "DATA": tmp_path / "data.jsonl"}
    words["MODEL"], words["GGUF"] = tiny_model("llama")[:2]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    said = refused(module, *(words.get(option, option) for option in options), PYTHONPATH=path)
    assert f"No module named '{package}'; " in said and f"pip install '.[{extra}]'" in said
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{package}>=' in project[project.index(f"\n{extra} = [") :].partition("]")[0]
