"""Memory: what a model needs, by llama.cpp's own account, and the sizes that are chosen where there is little."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny

from first_convert.convert import convert
from pyfirst import FirstBatch, FirstLlama, fit, predict
from pyfirst.cli import bench_files
from pyfirst.cli.run import main
from pyfirst.errors import InputError

MB = 1_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Four layers and a large vocabulary, 8 MB, trained for 4096 tokens."""
    shape = bench_files.Shape("llama", 4, 256, 768, 8, 8, 64, 20000, 4096, 5e5, 1e-5)
    path = tmp_path_factory.mktemp("fit") / "model.gguf"
    bench_files.write_synthetic(shape, path, "q4_1")
    return path


@pytest.fixture
def available(monkeypatch):
    """Sets the bytes that this process may take."""

    def set_to(size: int | None, address_space: bool = False) -> None:
        found = [] if size is None else [fit.Room(size, "a test", address_space)]
        monkeypatch.setattr(fit, "rooms", lambda: found)

    return set_to


def needed(model: Path, n_ctx: int, n_batch: int, **options) -> int:
    need = fit.plan(model, n_ctx=n_ctx, n_batch=n_batch, **options).need
    assert need is not None
    return need.total()


@pytest.mark.parametrize(("n_ctx", "n_batch"), [(256, 64), (512, 512), (4096, 512)])
def test_estimates_hold_what_llama_cpp_says_it_takes(model, n_ctx, n_batch, capfd):
    FirstLlama(model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch, n_threads=1, verbose=True).close()
    log = capfd.readouterr().err
    need = fit.plan(model, n_ctx=n_ctx, n_batch=n_batch).need
    assert need is not None
    took = {name: float(size) * 2**20 for name, size in re.findall(r"(KV|compute) buffer size =\s*([\d.]+) MiB", log)}
    assert need.cache == pytest.approx(took["KV"], rel=1e-3)
    assert took["compute"] <= need.compute <= 1.5 * took["compute"]
    assert need.weights == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors)


def reserved(path: Path, n_ctx: int, capfd) -> float:
    """Bytes of keys and values by llama.cpp's log."""
    FirstLlama(path, n_ctx=n_ctx, n_threads=1, verbose=True).close()
    sizes = re.findall(r"KV buffer size =\s*([\d.]+) MiB", capfd.readouterr().err)
    return sum(float(size) for size in sizes) * 2**20


def test_layers_with_a_sliding_window_keep_the_whole_context(tiny_model, capfd):
    need = fit.plan(tiny_model("gemma3")[1], n_ctx=8192).need
    assert need is not None and need.cache == reserved(tiny_model("gemma3")[1], 8192, capfd)


def test_layers_with_heads_of_their_own(tiny_model, tmp_path, capfd):
    source, path = gguf.GGUFReader(tiny_model("llama")[1]), tmp_path / "uneven.gguf"
    writer = gguf.GGUFWriter(path, "deci")
    for name, key in source.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "llama.attention.head_count")):
            writer.add_key_value(name.replace("llama.", "deci.", 1), key.contents(), *key.types[:2])
    writer.add_head_count([4, 2, 4, 4])
    writer.add_head_count_kv([2, 1, 2, 2])
    for tensor in source.tensors:
        data = tensor.data
        if re.match(r"blk\.1\.attn_[qkv]\.", tensor.name):
            data = data[: len(data) // 2]
        elif tensor.name.startswith("blk.1.attn_output."):
            data = np.ascontiguousarray(data[:, : data.shape[1] // 2])
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    key = (tiny.WIDTH // 4) * 2  # of one head, float16
    assert predict.token_bytes(path)["kv"] == [2 * heads * key for heads in (2, 1, 2, 2)]
    need = fit.plan(path, n_ctx=8192).need
    assert need is not None and need.cache == (7 + 4 * 2) * key * 8192 == reserved(path, 8192, capfd)


def test_little_memory_takes_small_batches_then_a_short_context(model, available):
    available(None)  # a system that tells nothing
    assert fit.plan(model, max_ctx=2048).text() == "n_ctx 2048, n_batch 512, mmap on"
    for n_ctx, n_batch in ((2048, 512), (2048, 128), (2048, 64), (1024, 64), (512, 64), (256, 64)):
        available(needed(model, n_ctx, n_batch))
        found = fit.plan(model, max_ctx=2048)
        assert (found.n_ctx, found.n_batch, found.use_mmap) == (n_ctx, n_batch, True)
    available(1000 * MB)
    assert fit.plan(model, max_ctx=2048).text().startswith("n_ctx 2048, n_batch 512, mmap on: needs about ")
    assert fit.plan(model, max_ctx=10**6).n_ctx == 4096, "no more than the model was trained for"


def test_what_cannot_fit_is_refused_with_the_numbers(model, available, capfd, caplog):
    available(20 * MB)
    with pytest.raises(
        InputError, match=r"with n_ctx 256 it needs about \d+ MB \(weights \d+ MB, keys .*, 20 MB are av"
    ):
        FirstLlama(model)
    with pytest.raises(InputError, match="take a smaller file or type"):
        FirstBatch(model)
    assert main(["-m", str(model), "-p", "a", "-n", "1"]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and "are available (a test)" in error
    # Who says how much wants it tried.
    with FirstBatch(model, n_ctx=300) as batch:
        assert batch.n_ctx == 300
    assert FirstLlama(model, n_ctx=300).context_params.n_ctx == 300
    assert caplog.text.count("with n_ctx 300 it needs about") == 2


def test_defaults_are_the_same_where_there_is_plenty(model, available, capfd):
    available(64_000 * MB)
    llm = FirstLlama(model)
    assert (llm.context_params.n_ctx, llm.context_params.n_batch, llm.context_params.n_ubatch) == (512, 512, 512)
    with FirstBatch(model, n_parallel=2) as batch:
        assert (batch.n_ctx, batch.n_batch) == (512, 512)
    assert main(["-m", str(model), "-p", "a", "-n", "1", "--verbose"]) == 0
    assert "pyfirst: n_ctx 2048, n_batch 512, mmap on: needs about " in capfd.readouterr().err


def test_options_of_the_user_stay(model, available):
    available(needed(model, 512, 64))
    llm = FirstLlama(model, n_batch=100, n_ctx=512)
    assert (llm.context_params.n_ctx, llm.context_params.n_batch) == (512, 100)
    llm = FirstLlama(model, n_ctx=512, use_mmap=False)
    assert llm.context_params.n_batch == 64
    with FirstBatch(model, n_parallel=1, n_ctx=512) as batch:
        assert batch.n_batch == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": -1}, "n_ctx is -1"),
        ({"n_batch": -5}, "n_batch is -5"),
        ({"type_k": 99}, "type_k is 99, expected a ggml type of keys and values: 0, 1, 2"),
        ({"type_v": 12}, "type_v is 12"),  # q4_K, which llama.cpp would end the process for
    ],
    ids=str,
)
def test_sizes_and_types_that_cannot_be(options, message, model):
    with pytest.raises(InputError, match=message):
        FirstLlama(model, **options)


def test_the_window_that_decides_is_one_batch(tiny_model, tmp_path, available):
    folder, base = tiny_model("llama")
    recipe = tiny.recipe(tmp_path / "recipe", folder, prefill="skip", window=200)
    convert(None, base_gguf=base, first=recipe, outfile=tmp_path / "skip.gguf")
    available(1)
    assert fit.plan(tmp_path / "skip.gguf", n_ctx=256).n_batch == 201
    assert fit.plan(tmp_path / "skip.gguf", n_ctx=256, prefill="full").n_batch == 64


def test_a_larger_type_of_cache_is_counted(model):
    half, full, q8 = (fit.plan(model, n_ctx=512, type_k=kind, type_v=kind).need for kind in (None, 0, 8))
    assert half is not None and full is not None and q8 is not None
    assert full.cache == 2 * half.cache and q8.cache == half.cache * 17 / 32
    four = fit.plan(model, n_ctx=512, n_seq=4).need
    assert four is not None and four.cache == 4 * half.cache


def test_what_says_nothing_of_its_size_is_left_to_the_loader(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_block_count(4)
    writer.add_head_count_kv([2, 2, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert fit.plan(tmp_path / "odd.gguf", max_ctx=700) == fit.Plan(700, 512)
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"no.gguf: not a usable GGUF file"):
        fit.plan(tmp_path / "no.gguf")


def test_available_memory_is_the_least_of_what_the_system_says(tmp_path):
    proc, root, own = tmp_path / "proc", tmp_path / "cgroup", tmp_path / "own"
    (root / "a/b").mkdir(parents=True)
    (root / "memory/c").mkdir(parents=True)
    proc.mkdir()
    assert fit.rooms(proc, root, own) == []
    (proc / "meminfo").write_text("MemTotal: 999999 kB\nMemAvailable:    1000 kB\n")
    assert fit.rooms(proc, root, own) == [fit.Room(1024000, "MemAvailable")]
    own.write_text("0::/a/b\n4:memory:/c\n")
    # Version 2: file pages give way; a group without a limit says max.
    for folder, limit in ((root / "a", "5000000"), (root / "a/b", "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("3000000")
        (folder / "memory.stat").write_text("anon 7\nactive_file 100000\ninactive_file 400000\n")
    # Version 1, and the number that means no limit.
    for folder, limit in ((root / "memory/c", "4000000"), (root / "memory", "9223372036854771712")):
        (folder / "memory.limit_in_bytes").write_text(limit)
        (folder / "memory.usage_in_bytes").write_text("5000000")
        (folder / "memory.stat").write_text("active_file 9\ntotal_active_file 1000000\ntotal_inactive_file 500000\n")
    found = {room.source: room.size for room in fit.rooms(proc, root, own)}
    assert found == {
        "memory limit of the cgroup, 5 MB": 2500000,
        "memory limit of the cgroup, 4 MB": 500000,
        "MemAvailable": 1024000,
    }


CHILD = """
import resource, sys
from pathlib import Path
from pyfirst import FirstLlama, fit, predict
model, n_ctx, share = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if share:
    need = fit.plan(model, n_ctx=n_ctx, n_batch=64, use_mmap=False, threads=1).need.total(True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(share * need),) * 2)
llm = FirstLlama(model, max_ctx=2048, n_threads=1, n_threads_batch=1)
steps = llm.generate(list(range(100, 200)), temp=0.0)
print(llm.context_params.n_ctx, llm.context_params.n_batch, [next(steps) for _ in range(8)])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_a_real_limit_of_the_address_space(model):
    def child(n_ctx: int, share: float) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", CHILD, str(model), str(n_ctx), str(share)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    free, tight, none = child(512, 0), child(512, 1.01), child(256, 0.8)
    assert free.stdout.startswith("2048 512 ["), free.stderr
    assert tight.stdout.startswith("512 64 ["), tight.stderr
    assert tight.stdout.split("[")[1] == free.stdout.split("[")[1]
    assert none.returncode == 1 and "are available (ulimit -v, " in none.stderr.splitlines()[-1]
