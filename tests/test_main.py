"""python -m pyfirst: where the library is, and what a file says of itself."""

from __future__ import annotations

import json
import os
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


def test_library_without_our_symbols_is_one_line(tmp_path):
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "pyfirst", "lib-path"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
