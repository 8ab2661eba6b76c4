"""The patched libllama: where it is, and its llama_first_* functions.

Importing this module makes ``import llama_cpp`` load our library, through
llama-cpp-python's own variable LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst import cpu
from pyfirst.errors import InputError, check_file

API_VERSION = 1
BINDINGS_VERSION = "0.3.36"
_LOG_LEVEL_ERROR = 4
ABORTED = 2  # what llama_decode() returns then

_STATUS = {
    -1: "the model has no routers",
    -2: "the layers of this architecture cannot be skipped",
    -3: "sequence, length or value out of range",
    -4: "not possible with what the sequence holds",
}


def _package_dir(name: str, witness: str, variable: str) -> Path:
    """A folder that the build installs into the package, also when Python imports the source tree."""
    if variable in os.environ:
        if list((named := Path(os.environ[variable])).glob(witness)):
            return named
        raise ImportError(f"{variable} is '{os.environ[variable]}', expected a folder with {witness}; or unset it")
    candidates = [Path(__file__).resolve().parent / name]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        candidates.append(Path(str(importlib.metadata.distribution("pyfirst").locate_file(f"pyfirst/{name}"))))
    for candidate in candidates:
        if list(candidate.glob(witness)):
            return candidate
    raise ImportError(
        f"{candidates[0]}: no {witness} there; pyfirst is not built: run 'pip install .' in its source folder"
    )


def lib_dir() -> Path:
    """Folder of the patched libllama and ggml. Raises ImportError when pyfirst is not built."""
    return _package_dir("lib", "*llama.*", "LLAMA_CPP_LIB_PATH")


def upstream_dir() -> Path:
    """Folder of upstream's convert_hf_to_gguf.py, conversion/ and gguf-py/. Raises ImportError."""
    return _package_dir("upstream", "convert_hf_to_gguf.py", "PYFIRST_UPSTREAM")


def bind(library: Any, signatures: Mapping[str, tuple[Any, list[Any]]]) -> Any:
    """Tell ctypes the types, (result, arguments), of functions of a library; return the library."""
    for name, (restype, argtypes) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    return library


def _load() -> ctypes.CDLL:
    """Import llama_cpp with our library and return the library. Raises ImportError."""
    if "llama_cpp" not in sys.modules:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(lib_dir())
        cpu.check(lib_dir())
    try:
        import llama_cpp
        from llama_cpp._logger import GGML_LOG_LEVEL_TO_LOGGING_LEVEL
    except (OSError, RuntimeError, AttributeError) as error:  # no library, a broken one, one of another program
        raise ImportError(f"{lib_dir()}: llama-cpp-python cannot use this library ({error})") from error

    # The bindings take warnings (3) for errors, and would print them also when told to be quiet.
    GGML_LOG_LEVEL_TO_LOGGING_LEVEL[3] = logging.WARNING
    if llama_cpp.__version__ != BINDINGS_VERSION:
        raise ImportError(
            f"llama-cpp-python {llama_cpp.__version__} is installed, pyfirst needs {BINDINGS_VERSION}: "
            f"pip install llama-cpp-python=={BINDINGS_VERSION}"
        )
    lib = llama_cpp.llama_cpp._lib
    for symbol in _SIGNATURES:
        if not hasattr(lib, symbol):
            raise ImportError(
                f"{lib._name}: the symbol {symbol} is missing, so this is not the patched library; import pyfirst "
                "before llama_cpp, and unset LLAMA_CPP_LIB_PATH if it points elsewhere"
            )
    bind(lib, _SIGNATURES)
    version = lib.llama_first_api_version()
    if version != API_VERSION:
        raise ImportError(f"{lib._name}: llama-first API version {version}, expected {API_VERSION}; rebuild pyfirst")
    return lib


_i32, _ptr, _size = ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t
_floats, _bytes = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_uint8)
_SIGNATURES: dict[str, tuple[type, list]] = {
    "llama_first_api_version": (_i32, []),
    "llama_model_first_n_layer": (_i32, [_ptr]),
    "llama_model_first_calibration": (_i32, [_ptr, _floats, _floats, _size]),
    "llama_first_set_routing": (_i32, [_ptr, ctypes.c_bool]),
    "llama_first_set_threshold": (_i32, [_ptr, ctypes.c_float]),
    "llama_first_set_prefill": (_i32, [_ptr, ctypes.c_int]),
    "llama_first_begin": (_i32, [_ptr, _i32]),
    "llama_first_commit": (_i32, [_ptr, _i32]),
    "llama_first_set_mask": (_i32, [_ptr, _i32, _bytes, _size]),
    "llama_first_get_mask": (_i32, [_ptr, _i32, _bytes, _size]),
    "llama_first_get_scores": (_i32, [_ptr, _i32, _floats, _size]),
}

lib = _load()


@contextlib.contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect what llama.cpp logs as errors meanwhile, so that an exception can give the reason."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if level == _LOG_LEVEL_ERROR:
            lines.append(text.decode("utf-8", errors="replace").strip())
        llama_log_callback(level, text, user_data)

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


@contextlib.contextmanager
def explained(model_path: str) -> Iterator[list[str]]:
    """Turn a failure to load ``model_path`` into an InputError that gives llama.cpp's reason; yields what it logs."""
    check_file(model_path)
    with captured_errors() as reasons:
        try:
            yield reasons
        except ValueError as error:
            reason = reasons[0].partition(": ")[2] if reasons else str(error)
            raise InputError(f"{model_path}: {reason}") from error


class AbortFlag:
    """Ends the llama_decode() at work in a context, from another thread: it returns ``ABORTED`` and is undone."""

    def __init__(self, ctx: int) -> None:
        import llama_cpp

        self._text = ctypes.create_string_buffer(2)
        # llama.cpp asks before every node of the graph: strlen, which needs no Python, is true for a text.
        self._ask = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
        llama_cpp.llama_set_abort_callback(ctx, self._ask, ctypes.cast(self._text, ctypes.c_void_p))

    @property
    def on(self) -> bool:
        """Whether what runs is to end."""
        return bool(self._text.value)

    @on.setter
    def on(self, value: bool) -> None:
        self._text.value = b"x" if value else b""


class Closed:
    """Takes the place of a freed model or context: any use of it raises RuntimeError, with ``reason``."""

    def __init__(self, reason: str):
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(self.__dict__["_reason"])


def check_vocab(vocab: Any, model_path: str) -> None:
    """Raise InputError for a file without a vocabulary: llama.cpp would end the process at the first text."""
    import llama_cpp

    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise InputError(f"{model_path}: no vocabulary in this file, so it reads and writes no text")


def check_tokens(vocab: Any, tokens: Iterable[int], what: str) -> list[int]:
    """The token ids; raises InputError for what is no token id of the vocabulary: llama.cpp might end the process."""
    import llama_cpp

    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise InputError(f"{what} is {reprlib.repr(tokens)}, expected a list of token ids")
    found = list(tokens)
    for token in found:
        if not isinstance(token, (int, np.integer)):
            raise InputError(f"{what} holds {reprlib.repr(token)}, expected token ids")
        if not 0 <= token < n_vocab:
            raise InputError(f"{what} holds token {token}, the vocabulary has {n_vocab}")
    return [int(token) for token in found]


def token_bytes(vocab: Any, token: int, special: bool = False) -> bytes:
    """The bytes that a token stands for; control tokens stand for none, or with ``special`` for their names."""
    import llama_cpp

    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def text_bytes(vocab: Any, tokens: Sequence[int], special: bool = False) -> bytes:
    """The bytes of a text. Raises InputError for a token id that the vocabulary lacks."""
    return b"".join(token_bytes(vocab, token, special) for token in check_tokens(vocab, tokens, "the text"))


def _check(status: int, what: str) -> int:
    if status < 0:
        raise InputError(f"{what}: {_STATUS.get(status, f'error {status}')}")
    return status


def _as_bytes(array: np.ndarray):
    return array.ctypes.data_as(_bytes)


def _as_floats(array: np.ndarray):
    return array.ctypes.data_as(_floats)


def routed_layers(model: int) -> int:
    """Number of layers with a router in a llama_model, 0 if the file has none."""
    return lib.llama_model_first_n_layer(model)


def calibration(model: int) -> tuple[np.ndarray, np.ndarray]:
    """Calibration points (threshold, mean share of layers kept), each float32 [n], measured after training."""
    none = np.empty(0, np.float32)
    n = lib.llama_model_first_calibration(model, _as_floats(none), _as_floats(none), 0)
    threshold, kept = np.empty(n, np.float32), np.empty(n, np.float32)
    lib.llama_model_first_calibration(model, _as_floats(threshold), _as_floats(kept), n)
    return threshold, kept


def set_routing(ctx: int, on: bool) -> None:
    """Route the sequences that start from now on. Raises InputError, with the reason, where the model cannot."""
    with captured_errors() as reasons:
        status = lib.llama_first_set_routing(ctx, on)
    _check(status, reasons[-1] if reasons else "routing")


def set_threshold(ctx: int, threshold: float) -> None:
    """A layer is kept when its mean score reaches the threshold. Raises InputError if it is not finite."""
    _check(lib.llama_first_set_threshold(ctx, threshold), f"threshold {threshold}")


def set_prefill(ctx: int, mode: int) -> int:
    """Set a mode, an index into metadata.PREFILL_MODES; returns that in force, "full" where layers are offloaded."""
    return _check(lib.llama_first_set_prefill(ctx, mode), f"prefill mode {mode}")


def begin(ctx: int, seq_id: int = 0) -> None:
    """Score the tokens of a sequence until commit(). Raises InputError.

    It must be empty or hold only scored tokens that ran all layers; their scores count.
    """
    _check(lib.llama_first_begin(ctx, seq_id), f"sequence {seq_id}")


def commit(ctx: int, seq_id: int = 0) -> None:
    """End of the prompt: pin the mask that the scores decide. Raises InputError if nothing was scored."""
    _check(lib.llama_first_commit(ctx, seq_id), f"sequence {seq_id}")


def set_mask(ctx: int, mask: np.ndarray | None, seq_id: int = 0) -> None:
    """Pin a mask, bool [n_layer], True = keep; None removes it. Raises InputError.

    Layers that a live sequence has skipped hold no keys and values, so they cannot come back.
    """
    with captured_errors() as reasons:
        if mask is None:
            status = lib.llama_first_set_mask(ctx, seq_id, None, 0)
        else:
            keep = np.ascontiguousarray(mask, dtype=np.uint8)
            status = lib.llama_first_set_mask(ctx, seq_id, _as_bytes(keep), keep.size)
    _check(status, reasons[-1] if reasons else f"mask of sequence {seq_id}")


def get_mask(ctx: int, n_layer: int, seq_id: int = 0) -> np.ndarray | None:
    """The pinned mask, bool [n_layer], or None."""
    keep = np.empty(n_layer, np.uint8)
    n = _check(lib.llama_first_get_mask(ctx, seq_id, _as_bytes(keep), keep.size), f"sequence {seq_id}")
    return keep.astype(bool) if n else None


def get_scores(ctx: int, n_layer: int, seq_id: int = 0) -> np.ndarray | None:
    """Mean scores of the prompt tokens read, float32 [n_layer], or None."""
    scores = np.empty(n_layer, np.float32)
    n = _check(lib.llama_first_get_scores(ctx, seq_id, _as_floats(scores), scores.size), f"sequence {seq_id}")
    return scores if n else None
