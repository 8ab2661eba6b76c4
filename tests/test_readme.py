"""Every command and every Python block of the README runs, word for word, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
SHELL = [line for kind, text in BLOCKS if kind == "sh" for line in text.strip().splitlines()]
# These build and install what this test runs on; make itself says whether they would do something.
BUILD = re.compile(r"make (\w+)$|pip install '\.\[([\w,]+)\]'$|CMAKE_ARGS=\S+ pip install .*(llama-cpp-python==\S+)$")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the README's reader has: a checkpoint, training data and a recipe without LoRA."""
    root = tmp_path_factory.mktemp("readme")
    tiny.make("llama", root / "my-model")
    tiny.gguf(root / "my-model", root / "other.gguf")
    tiny.recipe(root / "routers-only", root / "my-model", seed=3)
    words = tiny.TEXT.split()
    with (root / "my-task.jsonl").open("w", encoding="utf-8") as file:
        for i in range(24):
            row = {"prompt": " ".join(words[i % 9 : i % 9 + 6]), "response": " ".join(words[i % 7 : i % 7 + 3])}
            file.write(json.dumps(row) + "\n")
    return root


def test_the_readme_has_commands_and_python():
    assert len(SHELL) >= 8 and any(kind == "python" for kind, _ in BLOCKS)


@pytest.mark.parametrize("line", [line for line in SHELL if BUILD.match(line)])
def test_build_commands_exist(line):
    target, extras, pin = BUILD.match(line).groups()  # type: ignore[union-attr]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if target:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0
    elif extras:
        assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras.split(","))
    else:
        assert f'"{pin}"' in text


@pytest.mark.parametrize("name", ["README.md", "Makefile", "docs/raspberry-pi.md", "examples/llm_plugin/llm_first.py"])
def test_a_wheel_without_a_library_stays_out_of_the_cache(name):
    """pip gives what it once built of a release to every other environment, whatever it was built with."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if "install" in line and ("LLAMA_BUILD=OFF" in line or "wheel.cmake=false" in line)]
    assert bare and all(" --no-cache-dir " in line for line in bare)


def test_make_arm_works_in_a_path_with_spaces(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    done = subprocess.run(["make", "-n", "arm"], cwd=folder, capture_output=True, text=True)
    words = shlex.split(done.stdout, comments=True)
    assert f"-DCMAKE_INSTALL_PREFIX={folder}/build/aarch64/install" in words
    assert f"-DPython_EXECUTABLE={folder}/.venv/bin/python" in words


@pytest.mark.slow
def test_the_rest_runs_in_order(workplace):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    for line in SHELL:
        if BUILD.match(line) or (ROOT / shlex.split(line)[-1]).is_file():
            continue
        words = shlex.split(line)
        assert shutil.which(words[0], path=env["PATH"]), f"{words[0]} is not installed"
        result = subprocess.run(words, cwd=workplace, env=env, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    for kind, text in BLOCKS:
        if kind == "python":
            command = [sys.executable, "-c", text]
            result = subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert result.stdout
