"""llama.cpp's own quantizer, in a process of its own: an abort in native code or Ctrl-C ends only that."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from pathlib import Path
from typing import Any

from first_convert.pack import open_gguf
from first_convert.progress import bar
from first_convert.upstream import native
from pyfirst.errors import InputError

# Name -> llama_ftype, as llama-quantize offers them.
TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 8,
    "q5_1": 9,
    "q8_0": 7,
    "q2_k": 10,
    "q2_k_s": 21,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq1_s": 24,
    "iq1_m": 31,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "iq2_s": 28,
    "iq2_m": 29,
    "iq3_xxs": 23,
    "iq3_xs": 22,
    "iq3_s": 26,
    "iq3_m": 27,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "tq1_0": 36,
    "tq2_0": 37,
    "mxfp4_moe": 38,
    "q1_0": 40,
    "q2_0": 41,
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
PLAIN = ("f32", "f16", "bf16")
_FALLBACK = re.compile(
    r"(?P<tensor>\S+)\s+- ncols\s+(?P<columns>\d+) not divisible by\s+\d+ "
    r"\(required for type\s+(?P<wanted>\w+)\).*?-> falling back to\s+(?P<got>\w+)"
)


def outtype(name: str) -> str:
    """The canonical name of an output type. Raises InputError listing the known ones."""
    lowered = name.lower()
    lowered = ALIASES.get(lowered, lowered)
    if lowered not in TYPES:
        raise InputError(f"unknown outtype '{name}', expected one of {', '.join((*TYPES, *ALIASES))}")
    return lowered


def load_imatrix(path: str | Path) -> dict[str, Any]:
    """Importance matrix of llama-imatrix (GGUF): tensor name -> float32 mean squares. Raises InputError."""
    import numpy as np

    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    result = {}
    for name in tensors:
        if name.endswith(".in_sum2"):
            owner = name.removesuffix(".in_sum2")
            if (of_counts := f"{owner}.counts") not in tensors:
                raise InputError(f"{path}: '{name}' has no counts beside it")
            for tensor in (tensors[name], tensors[of_counts]):
                if tensor.kind != "F32":
                    raise InputError(f"{path}: '{tensor.name}' is {tensor.kind.lower()}, expected f32")
            sums, counts = (
                np.memmap(path, np.float32, "r", tensor.start, (tensor.elements,))
                for tensor in (tensors[name], tensors[of_counts])
            )
            if sums.size % (count := counts.size):
                raise InputError(f"{path}: '{name}' holds {sums.size} values, not a multiple of its {count} counts")
            column = counts.reshape(-1, 1)
            # Experts that no token reached weigh all values alike, as for llama-quantize; zeros would erase them.
            mean = np.where(column > 0, sums.reshape(count, -1) / np.maximum(column, 1), 1)
            if not (np.isfinite(mean) & (mean >= 0)).all():
                raise InputError(f"{path}: '{name}' holds a negative value, NaN or infinity; make the file again")
            result[owner] = np.ascontiguousarray(mean.ravel(), dtype=np.float32)
    if not result:
        raise InputError(f"{path}: no importance matrix in the file; make one with llama-imatrix")
    return result


def _structures(matrix: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The C array that llama_model_quantize takes, and what must outlive the call."""
    llama_cpp = native()
    array = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
    keep: list[Any] = [array]
    for slot, (name, values) in zip(array, matrix.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keep.append(values)
    return array, keep


def quantize(
    source: str | Path,
    out: str | Path,
    kind: str,
    threads: int = 0,
    imatrix: str | Path | None = None,
) -> dict[str, Any]:
    """Quantise a GGUF in this process; ``threads`` 0 means all cores.

    Returns {"fallbacks": [{"tensor", "columns", "wanted", "got"}]}, the tensors whose rows do not fit the
    blocks of the wanted type. Raises InputError with llama.cpp's own reason.
    """
    llama_cpp = native()
    from llama_cpp._logger import llama_log_callback

    sizes = {tensor.name: tensor.size for tensor in open_gguf(source).tensors}
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[kind], threads
    params.max_buf_size = 256 << 20
    keep: list[Any] = []
    if imatrix is not None:
        matrix = load_imatrix(imatrix)
        if not matrix.keys() & sizes.keys():
            raise InputError(
                f"{imatrix}: 0 of its {len(matrix)} tensors ('{next(iter(matrix))}', ...) are in this model; "
                "make one of this model with llama-imatrix"
            )
        array, keep = _structures(matrix)
        params.imatrix = ctypes.cast(array, type(params.imatrix))
    lines: list[str] = []
    current: list[str] = []
    progress = bar("Quantising", sum(sizes.values()))

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: Any) -> None:
        line = text.decode("utf-8", "replace")
        lines.append(line)
        if step := re.match(r"\[ *\d+/ *\d+\] +(\S+) ", line):
            progress.update(sizes.get(current[-1], 0) if current else 0)
            current.append(step[1])

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    try:
        status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
        progress.close()
    del keep
    text = "".join(lines)
    if status != 0:
        reasons = re.findall(r"failed to quantize: (.*)", text)
        reason = reasons[-1].strip() if reasons else f"llama_model_quantize returned {status}"
        if "imatrix" in reason or "importance matrix" in reason:
            reason += f"; {kind} needs --imatrix" if imatrix is None else f" ({imatrix})"
        elif "validation failed" in reason:
            reason += f"; '{current[-1]}' has values too large for it, use bf16 or f32"
        elif "iostream" in reason:
            free = shutil.disk_usage(Path(out).parent).free
            reason = f"cannot write {out}, {free / 1e6:.0f} MB are free there; is the disk full?"
        raise InputError(f"{kind}: {reason}")
    fallbacks = [m.groupdict() | {"columns": int(m["columns"])} for m in _FALLBACK.finditer(text)]
    return {"fallbacks": fallbacks}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """A job of worker.py: the arguments of ``quantize``; "result" and "verbose" are for the worker."""
    return quantize(**{name: value for name, value in job.items() if name not in ("result", "verbose")})
