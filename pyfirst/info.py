"""What a GGUF file says of itself: the header only, read by the library's own GGUF reader."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyfirst import metadata as key
from pyfirst import native
from pyfirst.errors import InputError

_STRING, _ARRAY = 8, 9
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
    lib, ptr, i64 = native.lib, ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "gguf_init_from_file": (ptr, [ctypes.c_char_p, _InitParams]),
        "gguf_free": (None, [ptr]),
        "gguf_find_key": (i64, [ptr, ctypes.c_char_p]),
        "gguf_get_kv_type": (ctypes.c_int, [ptr, i64]),
        "gguf_get_arr_type": (ctypes.c_int, [ptr, i64]),
        "gguf_get_arr_n": (ctypes.c_size_t, [ptr, i64]),
        "gguf_get_arr_data": (ptr, [ptr, i64]),
        "gguf_get_arr_str": (ctypes.c_char_p, [ptr, i64, ctypes.c_size_t]),
        "gguf_get_val_str": (ctypes.c_char_p, [ptr, i64]),
        "gguf_get_val_data": (ptr, [ptr, i64]),
        "gguf_get_n_tensors": (i64, [ptr]),
        "gguf_get_tensor_type": (ctypes.c_int, [ptr, i64]),
        "gguf_get_tensor_size": (ctypes.c_size_t, [ptr, i64]),
        "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    }
    for name, (restype, argtypes) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


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

    def tensor_bytes(self) -> dict[str, int]:
        """Type of tensor -> bytes of all such tensors."""
        lib, result = self._lib, dict[str, int]()
        for i in range(lib.gguf_get_n_tensors(self._handle)):
            name = lib.ggml_type_name(lib.gguf_get_tensor_type(self._handle, i)).decode()
            result[name] = result.get(name, 0) + lib.gguf_get_tensor_size(self._handle, i)
        return result


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Header]:
    """The header of a GGUF file. Raises InputError with the reason for anything else."""
    if not Path(path).is_file():
        raise InputError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
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
        yield Header(lib, handle)
    finally:
        lib.gguf_free(handle)


def _base_models(header: Header) -> list[dict[str, str]]:
    result = []
    for i in range(header.get("general.base_model.count", 0)):
        names = ("name", "organization", "version", "repo_url")
        found = {name: header.get(f"general.base_model.{i}.{name}") for name in names}
        result.append({name: value for name, value in found.items() if value})
    return result


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Architecture, shape, routers and provenance of a GGUF file, in a few milliseconds.

    What the file does not say is None; ``"first"`` is None for a file without routers. Raises InputError
    for anything but a GGUF file.
    """
    with opened(path) as header:
        architecture = header.get("general.architecture", "")
        types = header.tensor_bytes()
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
            "routers": header.get(key.VERSION) is not None,
            "first": None,
        }
        if result["routers"]:
            merged = header.get(key.LORA_MERGED, False)
            lora = {
                "rank": header.get(key.LORA_RANK),
                "alpha": header.get(key.LORA_ALPHA),
                "targets": header.get(key.LORA_TARGETS, []),
            }
            result["first"] = {
                "version": header.get(key.VERSION),
                "block_count": header.get(key.BLOCK_COUNT),
                "embedding_length": header.get(key.EMBEDDING_LENGTH),
                "norm": header.get(key.ROUTER_NORM, "none"),
                "threshold": header.get(key.ROUTER_THRESHOLD, 0.5),
                "prefill": header.get(key.PREFILL, "full"),
                "window": header.get(key.WINDOW, 512),
                "protected": header.get(key.PROTECTED, []),
                "calibration": {
                    "threshold": header.get(key.CALIBRATION_THRESHOLD, []),
                    "kept": header.get(key.CALIBRATION_KEPT, []),
                },
                "lora_merged": merged,
                "lora": lora if merged else None,
            }
        return result
