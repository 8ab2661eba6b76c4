from __future__ import annotations

import functools
from pathlib import Path

import pytest

import pyfirst.native  # noqa: F401  before anything imports llama_cpp


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """arch -> (model directory, its float32 GGUF), each made once per session."""
    import tiny

    @functools.cache
    def make(arch: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(arch)
        folder = tiny.make(arch, root / "hf")
        return folder, tiny.gguf(folder, root / "f32.gguf")

    return make


@pytest.fixture(scope="session")
def files(tiny_model, tmp_path_factory) -> dict[str, tuple[Path, Path, Path]]:
    """prefill -> (HF folder, recipe, GGUF whose routers decide by the prompt)."""
    import tiny

    from first_convert.convert import convert

    root = tmp_path_factory.mktemp("routed")
    folder, base = tiny_model("llama")
    calibration = {"threshold": [0.3, 0.5, 0.7], "kept": [1.0, 0.6, 0.2]}
    made = {}
    for prefill in ("full", "skip"):
        recipe = tiny.recipe(root / prefill, folder, seed=3, prefill=prefill, calibration=calibration)
        convert(None, base_gguf=base, first=recipe, outfile=root / f"{prefill}.gguf")
        made[prefill] = (folder, recipe, root / f"{prefill}.gguf")
    return made


@pytest.fixture(scope="session")
def model(files) -> Path:
    """A GGUF whose routers decide by the prompt, calibrated, with a chat template."""
    return files["full"][2]
