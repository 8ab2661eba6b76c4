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
