"""What a GGUF file says of itself, and whether it adds up: the header only, read by the library's own GGUF reader."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst import metadata as key
from pyfirst.errors import InputError, check_file
from pyfirst.recipe import FirstConfig

_STRING, _ARRAY = 8, 9
_MOST_BASE_MODELS = 100
_MOST_LAYERS = 512  # llama.cpp ends the process at more, and at none
_NAMES = dict(enumerate(["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64"]))
_SCALARS: dict[int, type] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _functions() -> Any:
    """The gguf_* functions of the library, with their types."""
    from pyfirst import native

    ptr, i64 = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "gguf_init_from_file": (ptr, [ctypes.c_char_p, _InitParams]),
        "gguf_free": (None, [ptr]),
        "gguf_get_data_offset": (ctypes.c_size_t, [ptr]),
        "gguf_get_tensor_offset": (ctypes.c_size_t, [ptr, i64]),
        "gguf_find_key": (i64, [ptr, ctypes.c_char_p]),
        "gguf_get_kv_type": (ctypes.c_int, [ptr, i64]),
        "gguf_get_arr_type": (ctypes.c_int, [ptr, i64]),
        "gguf_get_arr_n": (ctypes.c_size_t, [ptr, i64]),
        "gguf_get_arr_data": (ptr, [ptr, i64]),
        "gguf_get_arr_str": (ctypes.c_char_p, [ptr, i64, ctypes.c_size_t]),
        "gguf_get_val_str": (ctypes.c_char_p, [ptr, i64]),
        "gguf_get_val_data": (ptr, [ptr, i64]),
        "gguf_get_n_tensors": (i64, [ptr]),
        "gguf_get_tensor_name": (ctypes.c_char_p, [ptr, i64]),
        "gguf_get_tensor_type": (ctypes.c_int, [ptr, i64]),
        "gguf_get_tensor_size": (ctypes.c_size_t, [ptr, i64]),
        "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    }
    return native.bind(native.lib, signatures)


class Header:
    """The header of an open GGUF file."""

    def __init__(self, lib: Any, handle: int):
        self._lib, self._handle = lib, handle

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, a list for an array, ``default`` where it is absent."""
        lib, handle = self._lib, self._handle
        index = lib.gguf_find_key(handle, name.encode())
        if index < 0:
            return default
        kind = lib.gguf_get_kv_type(handle, index)
        if kind == _STRING:
            return lib.gguf_get_val_str(handle, index).decode("utf-8", "replace")
        if kind != _ARRAY:
            return _SCALARS[kind].from_address(lib.gguf_get_val_data(handle, index)).value  # type: ignore[attr-defined]
        kind, count = lib.gguf_get_arr_type(handle, index), lib.gguf_get_arr_n(handle, index)
        if kind == _STRING:
            found = [lib.gguf_get_arr_str(handle, index, i) for i in range(count)]
            return [text.decode("utf-8", "replace") for text in found]
        if count == 0 or kind not in _SCALARS:
            return []
        return list((_SCALARS[kind] * count).from_address(lib.gguf_get_arr_data(handle, index)))

    def kind(self, name: str) -> str | None:
        """Type of a key's value as "u32", "f32", "bool", "str", "f32[]", ...; None where it is absent."""
        lib, handle = self._lib, self._handle
        index = lib.gguf_find_key(handle, name.encode())
        if index < 0:
            return None
        kind = lib.gguf_get_kv_type(handle, index)
        if kind != _ARRAY:
            return _NAMES.get(kind, f"type {kind}")
        kind = lib.gguf_get_arr_type(handle, index)
        return _NAMES.get(kind, f"type {kind}") + "[]"

    def tensors(self) -> list[tuple[str, int, int]]:
        """(name, start from the beginning of the file, bytes) of every tensor."""
        lib, handle = self._lib, self._handle
        start = lib.gguf_get_data_offset(handle)
        return [
            (
                lib.gguf_get_tensor_name(handle, i).decode("utf-8", "replace"),
                start + lib.gguf_get_tensor_offset(handle, i),
                lib.gguf_get_tensor_size(handle, i),
            )
            for i in range(lib.gguf_get_n_tensors(handle))
        ]

    def end(self) -> int:
        """Where the last tensor ends, in bytes from the start of the file."""
        return max((start + size for _, start, size in self.tensors()), default=0)

    def tensor_bytes(self) -> dict[str, int]:
        """Type of tensor -> bytes of all such tensors."""
        lib, result = self._lib, dict[str, int]()
        for i in range(lib.gguf_get_n_tensors(self._handle)):
            name = lib.ggml_type_name(lib.gguf_get_tensor_type(self._handle, i)).decode()
            result[name] = result.get(name, 0) + lib.gguf_get_tensor_size(self._handle, i)
        return result


def _check_numbers(header: Header, path: str | os.PathLike[str]) -> None:
    """Raise InputError where a key that every reader relies on is of another type, or ends llama.cpp by its value."""
    if (kind := header.kind("general.architecture")) not in (None, "str"):
        raise InputError(f"{path}: the key 'general.architecture' is {kind}, expected str")
    architecture = header.get("general.architecture", "")
    own = ("block_count", "embedding_length", "context_length", "vocab_size", "expert_count", "expert_used_count")
    names = [f"{architecture}.{name}" for name in own]
    for name in (*names, "split.count", "split.no", "general.base_model.count"):
        if not isinstance(header.get(name, 0), int):
            raise InputError(f"{path}: the key '{name}' is {header.kind(name)}, expected a whole number")
    if not 1 <= (layers := header.get(names[0], 1)) <= _MOST_LAYERS:
        raise InputError(f"{path}: the key '{names[0]}' is {layers}, expected 1 to {_MOST_LAYERS}")
    for norm in ("layer_norm", "layer_norm_rms", "group_norm"):
        epsilon = header.get(name := f"{architecture}.attention.{norm}_epsilon", 0.0)
        if isinstance(epsilon, float) and not epsilon >= 0:
            raise InputError(f"{path}: the key '{name}' is {epsilon:g}, expected 0 or more")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Header]:
    """The header of a GGUF file. Raises InputError with the reason for anything else, ImportError without a library."""
    from pyfirst import native

    check_file(path)
    lib = _functions()
    logger = logging.getLogger("llama-cpp-python")
    if logger.level == logging.NOTSET:  # llama-cpp-python then prints all that llama.cpp logs
        logger.setLevel(logging.ERROR)
    with native.captured_errors() as reasons:
        handle = lib.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    if not handle:
        reason = reasons[0].partition(": ")[2] if reasons else "no reason given"
        raise InputError(f"{path}: not a usable GGUF file ({reason})")
    try:
        header = Header(lib, handle)
        size = Path(path).stat().st_size
        if size < (end := header.end()):
            raise InputError(f"{path}: cut short, {size} bytes where the tensors end at {end}")
        _check_numbers(header, path)
        yield header
    finally:
        lib.gguf_free(handle)


def _base_models(header: Header) -> list[dict[str, str]]:
    result = []
    for i in range(min(header.get("general.base_model.count", 0), _MOST_BASE_MODELS)):
        names = ("name", "organization", "version", "repo_url")
        found = {name: header.get(f"general.base_model.{i}.{name}") for name in names}
        result.append({name: value for name, value in found.items() if value})
    return result


def _lora(header: Header) -> dict[str, Any]:
    return {
        "rank": header.get(key.LORA_RANK),
        "alpha": header.get(key.LORA_ALPHA),
        "targets": header.get(key.LORA_TARGETS, []),
    }


def _provenance(header: Header) -> dict[str, Any] | None:
    """Recipe, inputs with their checksums, tools and date; None where the file says nothing."""
    names, checksums = header.get(key.SOURCE_NAMES, []), header.get(key.SOURCE_SHA256, [])
    found = {
        "recipe": header.get(key.RECIPE_NAME),
        "base_model": header.get(key.RECIPE_BASE_MODEL),
        "sources": dict(zip(names, checksums, strict=False)),
        "pyfirst": header.get(key.MADE_PYFIRST),
        "llama_cpp": header.get(key.MADE_LLAMA_CPP),
        "date": header.get(key.MADE_DATE),
    }
    return found if any(found.values()) else None


def describe_header(header: Header, path: str | os.PathLike[str]) -> dict[str, Any]:
    """info() of an open file."""
    architecture = header.get("general.architecture", "")
    types = header.tensor_bytes()
    merged = header.get(key.LORA_MERGED, False)
    result: dict[str, Any] = {
        "path": os.fspath(path),
        "bytes": Path(path).stat().st_size,
        "name": header.get("general.name"),
        "architecture": architecture,
        "layers": header.get(f"{architecture}.block_count"),
        "width": header.get(f"{architecture}.embedding_length"),
        "context_length": header.get(f"{architecture}.context_length"),
        "tensor_type": max(types, key=lambda name: types[name]) if types else None,
        "license": header.get("general.license"),
        "base_models": _base_models(header),
        "lora": _lora(header) if merged else None,
        "provenance": _provenance(header),
        "routers": any(header.kind(name) for name in key.ROUTING),
        "first": None,
    }
    if result["routers"]:
        result["first"] = {
            "version": header.get(key.VERSION),
            "block_count": header.get(key.BLOCK_COUNT),
            "embedding_length": header.get(key.EMBEDDING_LENGTH),
            "norm": header.get(key.ROUTER_NORM, FirstConfig.router_norm),
            "threshold": header.get(key.ROUTER_THRESHOLD, FirstConfig.threshold),
            "prefill": header.get(key.PREFILL, FirstConfig.prefill),
            "window": header.get(key.WINDOW, FirstConfig.window),
            "protected": header.get(key.PROTECTED, []),
            "calibration": {
                "threshold": header.get(key.CALIBRATION_THRESHOLD, []),
                "kept": header.get(key.CALIBRATION_KEPT, []),
            },
            "lora_merged": merged,
            "lora": result["lora"],
        }
    return result


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Architecture, shape, routers and provenance of a GGUF file, in a few milliseconds.

    What the file does not say is None; ``"first"`` is None for a file without routers. Raises InputError
    for anything but a GGUF file, and where a key of ours has another type.
    """
    with opened(path) as header:
        if wrong := mistyped(header):
            raise InputError(f"{path}: {wrong[0]}")
        return describe_header(header, path)


_KINDS = {
    key.VERSION: "u32",
    key.BLOCK_COUNT: "u32",
    key.EMBEDDING_LENGTH: "u32",
    key.ROUTER_WEIGHT: "f32[]",
    key.ROUTER_BIAS: "f32[]",
    key.ROUTER_NORM: "str",
    key.ROUTER_THRESHOLD: "f32",
    key.PREFILL: "str",
    key.WINDOW: "u32",
    key.PROTECTED: "u32[]",
    key.CALIBRATION_THRESHOLD: "f32[]",
    key.CALIBRATION_KEPT: "f32[]",
    key.LORA_MERGED: "bool",
    key.LORA_RANK: "u32",
    key.LORA_ALPHA: "f32",
    key.LORA_TARGETS: "str[]",
    key.RECIPE_NAME: "str",
    key.RECIPE_BASE_MODEL: "str",
    key.SOURCE_NAMES: "str[]",
    key.SOURCE_SHA256: "str[]",
    key.MADE_PYFIRST: "str",
    key.MADE_LLAMA_CPP: "str",
    key.MADE_DATE: "str",
}


def _router_problems(header: Header) -> Iterator[str]:
    """What is wrong with keys that are all there and of the right type."""
    architecture = header.get("general.architecture", "")
    layers, width = header.get(key.BLOCK_COUNT), header.get(key.EMBEDDING_LENGTH)
    if header.get(key.VERSION) != key.FORMAT_VERSION:
        yield f"{key.VERSION} is {header.get(key.VERSION)}, this pyfirst reads {key.FORMAT_VERSION}"
    for name, value in ((key.BLOCK_COUNT, layers), (key.EMBEDDING_LENGTH, width)):
        found = header.get(name.replace("first", architecture, 1))
        if found != value:
            yield f"{name} is {value}, the model's is {found}"
    for name, size in ((key.ROUTER_WEIGHT, layers * width), (key.ROUTER_BIAS, layers)):
        values = np.array(header.get(name), np.float32)
        if values.size != size:
            yield f"{name} holds {values.size} values, expected {size}"
        elif bad := np.flatnonzero(~np.isfinite(values)).tolist():
            yield f"{name} holds NaN or infinity at layer {bad[0] * layers // size}"
    for name, allowed in ((key.ROUTER_NORM, key.NORMS), (key.PREFILL, key.PREFILL_MODES)):
        if header.get(name, allowed[0]) not in allowed:
            yield f"{name} is '{header.get(name)}', expected one of {', '.join(allowed)}"
    if not 0 <= header.get(key.ROUTER_THRESHOLD, 0.5) <= 1:
        yield f"{key.ROUTER_THRESHOLD} is {header.get(key.ROUTER_THRESHOLD):g}, expected 0 to 1"
    if header.get(key.WINDOW, 1) == 0:
        yield f"{key.WINDOW} is 0, expected at least one token"
    if outside := [layer for layer in header.get(key.PROTECTED, []) if layer >= layers]:
        yield f"{key.PROTECTED} names layer {outside[0]}, the last is {layers - 1}"
    thresholds, kept = header.get(key.CALIBRATION_THRESHOLD, []), header.get(key.CALIBRATION_KEPT, [])
    if len(thresholds) != len(kept):
        yield f"{key.CALIBRATION_THRESHOLD} holds {len(thresholds)} points, {key.CALIBRATION_KEPT} {len(kept)}"
    for name, values in ((key.CALIBRATION_THRESHOLD, thresholds), (key.CALIBRATION_KEPT, kept)):
        if outside := [value for value in values if not 0 <= value <= 1]:
            yield f"{name} holds {outside[0]:g}, expected 0 to 1"


def mistyped(header: Header) -> list[str]:
    """The first.* keys whose type is not ours, one line each."""
    return [
        f"{name} is {header.kind(name)}, expected {kind}"
        for name, kind in _KINDS.items()
        if header.kind(name) not in (None, kind)
    ]


def problems(header: Header) -> list[str]:
    """What does not add up in the first.* keys of a file, one line each; nothing for a file without them."""
    found = mistyped(header)
    if any(header.kind(name) for name in key.ROUTING):
        found += [f"{name} is missing" for name in key.REQUIRED if header.kind(name) is None]
        if not found:
            found += _router_problems(header)
    if not found and header.get(key.LORA_MERGED):
        found += [f"{name} is missing" for name in (key.LORA_RANK, key.LORA_ALPHA) if header.kind(name) is None]
    if not found:
        names, checksums = header.get(key.SOURCE_NAMES, []), header.get(key.SOURCE_SHA256, [])
        if len(names) != len(checksums):
            found.append(f"{key.SOURCE_NAMES} names {len(names)} files, {key.SOURCE_SHA256} holds {len(checksums)}")
        found += [f"{key.SOURCE_SHA256} holds '{c}'" for c in checksums if not re.fullmatch("[0-9a-f]{64}", c)]
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """info() as (label, value) pairs to print; None means that the file does not say."""
    result = [
        ("file", f"{found['path']} ({found['bytes'] / 1e6:.1f} MB, {found['tensor_type']})"),
        ("name", found["name"]),
        ("architecture", found["architecture"]),
        ("layers", found["layers"]),
        ("width", found["width"]),
        ("trained context", found["context_length"]),
        ("licence", found["license"]),
    ]
    result += [("base model", " ".join(base.values())) for base in found["base_models"]]
    first, lora = found["first"], found["lora"]
    if not first:
        result.append(("routers", "no; the file runs dense"))
    else:
        result.append(("routers", f"broken, {key.VERSION} is missing" if first["version"] is None else "yes"))
        points = first["calibration"]
        table = [
            f"{kept:.0%} kept at {threshold:.3g}"
            for threshold, kept in zip(points["threshold"], points["kept"], strict=False)
        ]
        result += [
            ("router norm", first["norm"]),
            ("threshold", f"{first['threshold']:.6g}"),
            ("prefill", first["prefill"]),
            ("window", f"{first['window']} tokens" + ("" if first["prefill"] == "skip" else " (skip only)")),
            ("never skipped", ", ".join(map(str, first["protected"])) or "none"),
            ("calibration", ", ".join(table) or "none"),
        ]
    if lora:
        targets = ", ".join(lora["targets"]) or "unknown modules"
        alpha = "unknown" if lora["alpha"] is None else f"{lora['alpha']:g}"
        result.append(("LoRA merged", f"rank {lora['rank']}, alpha {alpha}, {targets}"))
    elif first:
        result.append(("LoRA merged", "no"))
    return result


def text(pairs: list[tuple[str, Any]]) -> str:
    """(label, value) pairs as lines."""
    return "\n".join(f"{name:16} {'unknown' if value is None else value}" for name, value in pairs)
