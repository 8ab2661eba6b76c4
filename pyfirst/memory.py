"""How much of a model's file an answer needs in memory: the pages of a layer that is skipped are not read.

That holds for weights that llama.cpp uses as they are in the file. Types that it rearranges for the processor when it
loads them (with AVX2 q4_0 and q4_K among others) are copied to memory of the process, skipped or not; that is
in ``anonymous_bytes``. llama.cpp reads the whole file once when it maps it, and the system reads ahead of what is asked
for, by megabytes on some disks. Both hide what the layers need, so it is measured after loading, from a cold cache and
without reading ahead: what would stay if memory were short. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst.errors import InputError, check_whole
from pyfirst.info import Header, opened

_MADV_NORMAL, _MADV_RANDOM, _MADV_DONTNEED = 0, 1, 4
_LEFT = 0.02  # share of a file that may stay in memory when it is evicted


def _libc(function: str, *args: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*args):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _mappings(path: str | os.PathLike[str]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what this process maps of a file."""
    real = os.path.realpath(path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name == real:
            start, end = (int(part, 16) for part in span.split("-"))
            yield start, end - start


def pages(path: str | os.PathLike[str]) -> np.ndarray:
    """Which pages of a file are in the page cache, bool [pages]. Raises OSError."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        size = ctypes.c_size_t(len(mapped))
        _libc("mincore", ctypes.c_void_p(view.ctypes.data), size, ctypes.c_void_p(found.ctypes.data))
        del view
    return (found & 1).astype(bool)


def _advise(path: str | os.PathLike[str], advice: int) -> None:
    """madvise() for what this process maps of a file."""
    for address, size in _mappings(path):
        with contextlib.suppress(OSError):  # locked pages, which evict() finds
            _libc("madvise", ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


def evict(path: str | os.PathLike[str]) -> None:
    """Drop a file's pages from memory, also where this process maps it; they are read again when needed.

    Raises InputError where they stay: another process uses the file, or it lies in memory (tmpfs), or not on Linux.
    """
    if not sys.platform.startswith("linux"):
        raise InputError(f"{path}: what of a file is in memory can be measured on Linux only")
    _advise(path, _MADV_DONTNEED)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = pages(path)
    if left.mean() > _LEFT:
        raise InputError(
            f"{path}: {left.sum() * mmap.PAGESIZE / 1e6:.0f} MB of it cannot be dropped from memory; another process "
            "uses the file, or it lies on a RAM disk"
        )


def _status(name: str) -> int | None:
    """Bytes of a line of /proc/self/status, None where it is absent."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _bytes_read() -> int | None:
    """Bytes that this process has had read from storage, None where the system does not tell."""
    with contextlib.suppress(OSError):
        match = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
        return int(match[1]) if match else None
    return None


@dataclass
class Usage:
    """What a piece of work needed of a file.

    Attributes:
        read_bytes: read from storage meanwhile, by the whole process; None where the system does not tell.
        resident_bytes: of the file, in memory at the end.
        anonymous_bytes: of the process, in memory at the end and not backed by a file.
        pages: bool [pages], those of the file that are in memory at the end.
    """

    read_bytes: int | None = None
    resident_bytes: int = 0
    anonymous_bytes: int | None = None
    pages: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


@contextlib.contextmanager
def watch(path: str | os.PathLike[str]) -> Iterator[Usage]:
    """Evict a file, let the with block work without reading ahead, and fill in what it needed.

    Map the file before. Raises InputError as evict() does.
    """
    evict(path)
    _advise(path, _MADV_RANDOM)
    usage, before = Usage(), _bytes_read()
    try:
        yield usage
    finally:
        _advise(path, _MADV_NORMAL)
    after = _bytes_read()
    if before is not None and after is not None:
        usage.read_bytes = after - before
    usage.pages = pages(path)
    usage.resident_bytes = int(usage.pages.sum()) * mmap.PAGESIZE
    usage.anonymous_bytes = _status("RssAnon")


def layer_spans(header: Header) -> list[list[tuple[int, int]]]:
    """(start, end) of the tensors of each layer, in bytes from the start of the file."""
    n_layer = header.get(f"{header.get('general.architecture')}.block_count", 0)
    spans: list[list[tuple[int, int]]] = [[] for _ in range(n_layer)]
    for name, start, size in header.tensors():
        match = re.match(r"blk\.(\d+)\.", name)
        if match and int(match[1]) < n_layer:
            spans[int(match[1])].append((start, start + size))
    return spans


def layers_resident(spans: Sequence[Sequence[tuple[int, int]]], present: np.ndarray) -> list[float]:
    """Share of each layer's pages that ``present``, bool [pages], names."""
    shares = []
    for layer in spans:
        own = np.zeros(len(present), bool)
        for start, end in layer:
            own[start // mmap.PAGESIZE : -(-end // mmap.PAGESIZE)] = True
        shares.append(float(present[own].mean()) if own.any() else 0.0)
    return shares


def kv_bytes(header: Header, n_ctx: int, item: int = 2, *, reserved: bool = False) -> list[int]:
    """Bytes of each layer's keys and values for ``n_ctx`` tokens of ``item`` bytes a value (2: float16).

    ``reserved``: what llama.cpp sets aside without flash attention, where values are as wide as in the widest layer.
    Raises InputError where a key holds values for another number of layers, or no numbers.
    """
    name = header.get("general.architecture")
    n_layer, width = header.get(f"{name}.block_count", 0), header.get(f"{name}.embedding_length", 0)

    def each(key: str, default: Any) -> list[int]:
        value = header.get(f"{name}.attention.{key}", default)
        if not isinstance(value, list):
            value = [value] * n_layer
        if not all(isinstance(number, int) for number in value):
            raise InputError(f"the key '{name}.attention.{key}' holds no whole number")
        if len(value) != n_layer:
            raise InputError(f"the key '{name}.attention.{key}' holds {len(value)} values for {n_layer} layers")
        return value

    heads = each("head_count", 1)
    heads_kv = each("head_count_kv", heads)
    size = width // max(heads[0], 1) if heads else 0
    keys = [length * n for length, n in zip(each("key_length", size), heads_kv, strict=True)]
    values = [length * n for length, n in zip(each("value_length", size), heads_kv, strict=True)]
    if reserved:
        values = [max(values) if width else 0 for width in values]
    return [(k + v) * n_ctx * item for k, v in zip(keys, values, strict=True)]


def check(model: str | os.PathLike[str]) -> None:
    """Raise InputError where compare() cannot measure the file, before anything is computed."""
    with opened(model) as header:
        check_whole(header, model)
    evict(model)


def compare(
    model: str | os.PathLike[str],
    tokens: Sequence[int],
    *,
    n_predict: int = 16,
    n_ctx: int | None = None,
    threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer a prompt with all layers and then as ``options`` of FirstLlama say, each from a cold cache.

    Args:
        model: GGUF file, in one piece.
        tokens: the prompt.
        n_predict: tokens to generate, greedily.
        n_ctx: context length; default: as long as prompt and answer.
        **options: of FirstLlama, such as prefill="skip" or skip_layers=[3]; in "full" the prompt reads all layers.

    Returns {"file_bytes", "n_ctx", "dense", "routed"}, the two with "read_bytes", "resident_bytes",
    "anonymous_bytes" (see Usage), "kept" (layers), "layers" (share of each layer's pages in memory) and "kv_bytes"
    (keys and values that are written, in "full" the prompt's in all layers; llama.cpp reserves those of all). Raises
    InputError.
    """
    from pyfirst.llama import FirstLlama

    n_ctx = n_ctx or len(tokens) + n_predict
    with opened(model) as header:
        check_whole(header, model)
        spans, token = layer_spans(header), kv_bytes(header, 1)
    result: dict[str, Any] = {"file_bytes": Path(model).stat().st_size, "n_ctx": n_ctx}
    for name, own in (("dense", {"routing": False}), ("routed", options)):
        llm = FirstLlama(model, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, use_mmap=True, **own)
        try:
            with watch(model) as usage:
                for _ in islice(llm.generate(list(tokens), temp=0.0), n_predict):
                    pass
            assert llm.routing is not None
            mask, n_written = llm.routing.mask, llm.n_tokens
            n_dense = len(tokens) if llm.routing.prefill == "full" else 0
        finally:
            llm.close()
        result[name] = {
            "kept": int(mask.sum()),
            "read_bytes": usage.read_bytes,
            "resident_bytes": usage.resident_bytes,
            "anonymous_bytes": usage.anonymous_bytes,
            "layers": layers_resident(spans, usage.pages),
            "kv_bytes": sum(size * (n_written if keep else n_dense) for size, keep in zip(token, mask, strict=True)),
        }
    return result


def text(result: dict[str, Any]) -> str:
    """The text form of compare()."""

    def megabytes(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 1e6:.1f}"

    dense, routed = result["dense"], result["routed"]
    rows = [("", "dense", "routed"), ("layers kept", str(dense["kept"]), str(routed["kept"]))]
    for label, key in (
        ("read from the file, MB", "read_bytes"),
        ("file in memory, MB", "resident_bytes"),
        ("other memory, MB", "anonymous_bytes"),
        ("keys and values, MB", "kv_bytes"),
    ):
        rows.append((label, megabytes(dense[key]), megabytes(routed[key])))
    lines = [f"{label:26}{left:>10}{right:>10}" for label, left, right in rows]
    return "\n".join([*lines, f"after loading, from a cold cache; the file has {result['file_bytes'] / 1e6:.1f} MB"])
