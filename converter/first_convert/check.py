"""What a finished GGUF must pass before it gets its name."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from first_convert import pack
from first_convert.progress import bar
from first_convert.upstream import gguf, native
from pyfirst.errors import InputError


def _params() -> Any:
    params = native().llama_model_default_params()
    params.n_gpu_layers = 0
    # Names and shapes only: nothing is allocated, mapped or read of the tensors.
    params.no_alloc, params.load_mode = True, native().LLAMA_LOAD_MODE_NONE
    return params


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep llama.cpp's log off the terminal; errors are raised with their reason instead."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def finite(path: Path) -> None:
    """Raise InputError naming the first float tensor of a GGUF that holds NaN or infinity."""
    import numpy as np

    layouts = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000)}
    tensors = [tensor for tensor in pack.open_gguf(path).tensors if tensor.kind in layouts]
    with bar("Checking", sum(tensor.size for tensor in tensors)) as progress:
        for tensor in tensors:
            dtype, exponent = layouts[tensor.kind]
            words = np.memmap(path, dtype, "r", tensor.start, (tensor.elements,))
            for start in range(0, words.size, 1 << 22):
                part = words[start : start + (1 << 22)]
                if ((part & exponent) == exponent).any():
                    hint = "; a value is beyond 65504, use bf16 or f32" if tensor.kind == "F16" else ""
                    raise InputError(f"tensor '{tensor.name}' holds NaN or infinity as {tensor.kind}{hint}")
                progress.update(part.nbytes)


@_silent()
def loads(path: Path, probes: Sequence[tuple[str, list[int]]]) -> list[str]:
    """Load the finished file with llama.cpp, and return the probe texts that it cuts into other tokens.

    Raises InputError with llama.cpp's reason when it does not load.
    """
    llama_cpp = native()
    from pyfirst.native import captured_errors

    with captured_errors() as reasons:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), _params())
    if not model:
        reason = reasons[0].strip() if reasons else "no reason given"
        raise InputError(f"llama.cpp does not load the result: {reason}")
    try:
        vocab = llama_cpp.llama_model_get_vocab(model)
        wrong = []
        for text, expected in probes:
            raw = text.encode()
            ids = (llama_cpp.llama_token * (len(raw) + 8))()
            count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, True)
            if list(ids[: max(count, 0)]) != list(expected):
                wrong.append(text)
        return wrong
    finally:
        llama_cpp.llama_model_free(model)


@_silent()
def routes(path: Path) -> str | None:
    """llama.cpp's reason why it cannot skip layers of this file, None when it can."""
    llama_cpp = native()
    from pyfirst.native import set_routing

    context, model = None, llama_cpp.llama_model_load_from_file(os.fsencode(path), _params())
    try:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
        context = llama_cpp.llama_init_from_model(model, settings)
        if not context:
            return "llama.cpp cannot make a context for it"
        set_routing(context, True)
    except InputError as error:
        return str(error)
    finally:
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return None


def fallback_cost(path: Path, fallbacks: list[dict[str, Any]]) -> int:
    """Bytes that fallback types add to the tensors of a file."""
    lib = gguf()
    sizes = {name.lower(): lib.GGML_QUANT_SIZES[kind] for name, kind in lib.GGMLQuantizationType.__members__.items()}
    counts = {t.name: t.elements for t in pack.open_gguf(path).tensors}
    cost = 0.0
    for entry in fallbacks:
        (block, size), (wanted_block, wanted_size) = (
            sizes[entry["got"].lower()],
            sizes[entry["wanted"].lower()],
        )
        cost += counts[entry["tensor"]] * (size / block - wanted_size / wanted_block)
    return round(cost)
