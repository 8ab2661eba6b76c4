"""Files that first-bench makes for itself: random models of a known shape, models with fewer layers, router arrays."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pyfirst.cli.common import temporary_folder
from pyfirst.errors import InputError, check_whole

if TYPE_CHECKING:
    from first_convert.ggufio import Gguf

ARRAY_FLOATS = 131072
KINDS = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl")
_POOL_VALUES = 1 << 20
_CHUNK_ROWS = 4096
_ALIGNMENT = 32
_END = "<|end|>"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model whose output matrix is its embedding matrix."""

    architecture: str
    n_layer: int
    width: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_vocab: int
    context: int
    rope_base: float
    eps: float

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, dimensions innermost first) of every tensor, in the file's order; norms have one dimension."""
        q, kv = self.n_head * self.head_size, self.n_head_kv * self.head_size
        yield "token_embd.weight", (self.width, self.n_vocab)
        yield "output_norm.weight", (self.width,)
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (self.width,),
            "attn_q": (self.width, q),
            "attn_k": (self.width, kv),
            "attn_v": (self.width, kv),
            "attn_output": (q, self.width),
            "ffn_norm": (self.width,),
            "ffn_gate": (self.width, self.n_ff),
            "ffn_up": (self.width, self.n_ff),
            "ffn_down": (self.n_ff, self.width),
        }
        if self.architecture == "qwen3":
            layer |= {"attn_q_norm": (self.head_size,), "attn_k_norm": (self.head_size,)}
        for il in range(self.n_layer):
            for name, dims in layer.items():
                yield f"blk.{il}.{name}.weight", dims


SHAPES = {
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5, 1e-5),
    "llama-3.2-3b": Shape("llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072, 5e5, 1e-5),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6, 1e-6),
}


def _functions() -> Any:
    """The ggml_* functions of the library, with their types."""
    from pyfirst import native

    ptr, i64 = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
        "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, i64]),
        "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, ptr, ptr, i64, i64, i64, ptr]),
    }
    return native.bind(native.lib, signatures)


def _type_number(lib: Any, kind: str) -> int:
    """ggml's number of a type, in any case of letters."""
    return next(i for i in range(64) if (lib.ggml_type_name(i) or b"").lower() == kind.lower().encode())


def _byte_words() -> list[str]:
    """The 256 tokens of a byte-level vocabulary, in GPT-2's spelling."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def _keys(shape: Shape, name: str) -> list[Any]:
    from first_convert.ggufio import Entry

    words = [*_byte_words(), _END, "Ġt"]
    words += [f"<|{i}|>" for i in range(len(words), shape.n_vocab)]
    normal, control, unused = 1, 3, 5
    kinds = [normal] * 256 + [control, normal] + [unused] * (shape.n_vocab - 258)
    own = {
        "context_length": ("UINT32", shape.context),
        "embedding_length": ("UINT32", shape.width),
        "block_count": ("UINT32", shape.n_layer),
        "feed_forward_length": ("UINT32", shape.n_ff),
        "attention.head_count": ("UINT32", shape.n_head),
        "attention.head_count_kv": ("UINT32", shape.n_head_kv),
        "attention.key_length": ("UINT32", shape.head_size),
        "attention.value_length": ("UINT32", shape.head_size),
        "attention.layer_norm_rms_epsilon": ("FLOAT32", shape.eps),
        "rope.dimension_count": ("UINT32", shape.head_size),
        "rope.freq_base": ("FLOAT32", shape.rope_base),
        "vocab_size": ("UINT32", shape.n_vocab),
    }
    return [
        Entry("general.architecture", "STRING", shape.architecture),
        Entry("general.name", "STRING", f"random weights, shape of {name}"),
        Entry("general.quantization_version", "UINT32", 2),
        *(Entry(f"{shape.architecture}.{key}", kind, value) for key, (kind, value) in own.items()),
        Entry("tokenizer.ggml.model", "STRING", "gpt2"),
        Entry("tokenizer.ggml.pre", "STRING", "gpt-2"),
        Entry("tokenizer.ggml.tokens", "ARRAY", words, "STRING"),
        Entry("tokenizer.ggml.token_type", "ARRAY", kinds, "INT32"),
        Entry("tokenizer.ggml.merges", "ARRAY", ["Ġ t"], "STRING"),
        Entry("tokenizer.ggml.bos_token_id", "UINT32", 256),
        Entry("tokenizer.ggml.eos_token_id", "UINT32", 256),
        Entry("tokenizer.ggml.add_bos_token", "BOOL", False),
    ]


def _write_header(file: BinaryIO, pairs: Sequence[bytes], infos: Sequence[tuple[str, Sequence[int], int, int]]) -> int:
    """Magic, keys and (name, dimensions, type number, bytes) of the tensors, each aligned, up to the first tensor.

    Returns the bytes that the tensors take behind it.
    """
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(pairs)))
    file.writelines(pairs)
    offset = 0
    for name, dims, number, size in infos:
        raw = name.encode()
        file.write(struct.pack(f"<Q{len(raw)}sI{len(dims)}QIQ", len(raw), raw, len(dims), *dims, number, offset))
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    file.write(bytes(-file.tell() % _ALIGNMENT))
    return offset


def write_synthetic(
    shape: Shape,
    out: str | os.PathLike[str],
    kind: str = "q4_0",
    name: str = "synthetic",
    seed: int = 0,
    weights: bool = True,
) -> None:
    """Write a random model of a shape, its matrices of a type in KINDS.

    As llama-quantize does, an embedding matrix that is the output too gets q6_K where ``kind`` is smaller. Rows are
    drawn from a pool that is quantised once, so that memory stays at some megabytes. Without ``weights`` all of them
    are a hole that takes no disk: enough for whoever reads the header only. Raises InputError.
    """
    from first_convert.ggufio import pack_entry

    lib = _functions()
    rng = np.random.default_rng(seed)
    pools: dict[tuple[str, int], np.ndarray] = {}

    def pool(kind: str, n: int) -> np.ndarray:
        """Random rows of length n in a type, uint8 [rows, bytes of a row]."""
        if (kind, n) not in pools:
            rows = max(1, _POOL_VALUES // n)
            values = rng.normal(0, 0.02, (rows, n)).astype(np.float32)
            number = _type_number(lib, kind)
            packed = np.empty((rows, lib.ggml_row_size(number, n)), np.uint8)
            lib.ggml_quantize_chunk(number, values.ctypes.data, packed.ctypes.data, 0, rows, n, None)
            pools[kind, n] = packed
        return pools[kind, n]

    def kind_of(name: str, dims: tuple[int, ...]) -> str:
        if len(dims) == 1:
            return "f32"
        small = kind not in ("f32", "f16", "bf16", "q8_0")
        return "q6_K" if small and name == "token_embd.weight" else kind

    tensors = [(name, dims, kind_of(name, dims)) for name, dims in shape.tensors()]
    numbers = {kind: _type_number(lib, kind) for _, _, kind in tensors}
    infos = [
        (name, dims, numbers[kind], lib.ggml_row_size(numbers[kind], dims[0]) * int(np.prod(dims[1:])))
        for name, dims, kind in tensors
    ]
    free = shutil.disk_usage(Path(out).parent).free
    total = sum(size for *_, size in infos)
    if weights and free < total + (1 << 24):
        raise InputError(f"{out}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    with Path(out).open("wb") as file:
        behind = _write_header(file, [pack_entry(entry) for entry in _keys(shape, name)], infos)
        if not weights:
            file.truncate(file.tell() + behind)
            return
        for _, dims, kind in tensors:
            if len(dims) == 1:
                file.write(np.ones(dims, np.float32).tobytes())
            else:
                rows = pool(kind, dims[0])
                for start in range(0, dims[1], _CHUNK_ROWS):
                    count = min(_CHUNK_ROWS, dims[1] - start)
                    file.write(rows[rng.integers(0, len(rows), count)].data)
            file.write(bytes(-file.tell() % _ALIGNMENT))


def cache_dir() -> Path:
    """Where made files lie. Raises InputError for a user without a home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyfirst"
    except RuntimeError:
        raise InputError("no home directory to make files in; name another folder in XDG_CACHE_HOME") from None


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder below cache_dir() that is removed at the end."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with temporary_folder(cache_dir(), "bench") as path:
        yield path


@contextlib.contextmanager
def synthetic(name: str, kind: str = "q4_0", keep: bool = False, weights: bool = True) -> Iterator[Path]:
    """A file by write_synthetic(), removed at the end; with ``keep`` it stays in cache_dir() and is used again."""
    if name not in SHAPES:
        raise InputError(f"--synthetic is '{name}', expected one of {', '.join(SHAPES)}")
    if kind not in KINDS:
        raise InputError(f"--type is '{kind}', expected one of {', '.join(KINDS)}")
    kept = cache_dir() / f"{name}-{kind}.gguf"
    if keep and kept.is_file():
        yield kept
        return
    with folder() as temporary:
        made = temporary / kept.name
        write_synthetic(SHAPES[name], made, kind, name, weights=weights)
        yield made.replace(kept) if keep else made


def prune(source: Gguf, keep: Sequence[int], out: str | os.PathLike[str]) -> None:
    """Write the model without its other layers and without routers: what a file with fewer layers would do.

    Keys of the architecture that hold one value a layer lose theirs too. Raises InputError for a split model.
    """
    from first_convert.ggufio import NUMBERS, Entry, pack_entry

    items = {number: name for name, number in NUMBERS.items()}
    check_whole(source, source.path)
    architecture = source.get("general.architecture")
    count = f"{architecture}.block_count"
    n_layer, new = source.get(count), {old: i for i, old in enumerate(keep)}
    pairs = []
    for name, key in source.keys.items():
        value = source.get(name) if name.startswith(f"{architecture}.") else None
        if name == count:
            pairs.append(pack_entry(Entry(name, "UINT32", len(keep))))
        elif isinstance(value, list) and len(value) == n_layer:
            item = items.get(struct.unpack_from("<I", source.data, key.value)[0])
            if item is None:
                raise InputError(f"{source.path}: the key '{name}' is an array of an unusual type")
            pairs.append(pack_entry(Entry(name, "ARRAY", [value[old] for old in keep], item)))
        elif not name.startswith("first.") and name != "general.alignment":
            pairs.append(source.data[key.start : key.end])

    lib = _functions()
    kept = []
    for tensor in source.tensors:
        match = re.match(r"blk\.(\d+)\.", tensor.name)
        if match is None:
            kept.append((tensor.name, tensor))
        elif int(match[1]) in new:
            kept.append((f"blk.{new[int(match[1])]}.{tensor.name[match.end() :]}", tensor))
    numbers = {kind: _type_number(lib, kind) for kind in {tensor.kind for _, tensor in kept}}
    with Path(out).open("wb") as file:
        _write_header(file, pairs, [(name, t.shape, numbers[t.kind], t.size) for name, t in kept])
        for _, tensor in kept:
            file.write(memoryview(source.data)[tensor.start : tensor.start + tensor.size])
            file.write(bytes(-file.tell() % _ALIGNMENT))


def router_copies(model: str, folder: Path) -> tuple[Path, Path]:
    """The model without routers, and with routers whose arrays are filled up to ARRAY_FLOATS."""
    from first_convert.ggufio import Entry, rewrite
    from first_convert.pack import entries, open_gguf
    from pyfirst.recipe import FirstConfig, Recipe

    source = open_gguf(model)
    architecture = source.get("general.architecture")
    n_layer, width = (source.get(f"{architecture}.{name}") for name in ("block_count", "embedding_length"))
    recipe = Recipe(
        FirstConfig(n_layer, width),
        np.zeros((n_layer, width), np.float32),
        np.zeros(n_layer, np.float32),
        None,
    )
    added = entries(recipe)
    missing = ARRAY_FLOATS - n_layer * (width + 1)
    if missing > 0:
        added.append(Entry("first.bench.filler", "ARRAY", [0.0] * missing, "FLOAT32"))
    without, with_routers = folder / "without.gguf", folder / "with.gguf"
    rewrite(source, without, [], lambda name: not name.startswith("first."))
    rewrite(source, with_routers, added, lambda name: not name.startswith("first."))
    return without, with_routers
