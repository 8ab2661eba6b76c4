"""Decoding speed of a file on a machine that is not at hand: the bytes a token reads, against memory bandwidth.

A token reads every weight that takes part in it once, and the keys and values of the context. Where memory is the
limit, seconds = bytes / bandwidth; where the processor is (no dot product instructions, one thread), the real speed
is lower. So the result is an upper bound, and the nearer to the truth the larger the file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

from pyfirst import info, memory
from pyfirst.errors import InputError, check_whole

# What all cores together read from memory, GB/s (1e9 bytes); assumed, not measured here.
BOARDS = {"pi5": 10.0, "pi4": 4.0}
_ROWS_ONLY = ("token_embd.weight", "position_embd.weight", "per_layer_token_embd.weight")


def parse_bandwidth(text: str) -> float:
    """GB/s of "pi5", "pi4" or a number. Raises InputError."""
    try:
        bandwidth = BOARDS.get(text.lower()) or float(text)
    except ValueError:
        bandwidth = math.nan
    if not 0 < bandwidth < math.inf:
        raise InputError(
            f"--predict is '{text}', expected {', '.join(BOARDS)} or a memory bandwidth in GB/s such as 25"
        )
    return bandwidth


def token_bytes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What decoding one token reads, from the file's header.

    Returns {"fixed": bytes outside layers, "layers": [bytes of each], "kv": [bytes of each layer for each token of
    context, float16]}. Embeddings count only where they are the output matrix too: otherwise one row is read. Of a
    layer's experts only those used count. Sliding windows are not taken off the context. Raises InputError.
    """
    with info.opened(path) as header:
        check_whole(header, path)
        architecture = header.get("general.architecture", "")

        def get(name: str, default: Any = None) -> Any:
            return header.get(f"{architecture}.{name}", default)

        n_layer = get("block_count")
        if not n_layer or not get("embedding_length") or not get("attention.head_count"):
            raise InputError(f"{path}: not a language model with attention, nothing to predict for '{architecture}'")
        tensors = header.tensors()
        try:
            kv = memory.kv_bytes(header, 1)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        experts = get("expert_used_count", 0) / max(get("expert_count", 0), 1)
    tied = not any(name == "output.weight" for name, _, _ in tensors)
    fixed, layers = 0.0, [0.0] * n_layer
    for name, _, size in tensors:
        if found := re.match(r"blk\.(\d+)\.", name):
            if (layer := int(found[1])) < n_layer:
                layers[layer] += size * experts if "_exps." in name else size
        elif name not in _ROWS_ONLY or (tied and name == "token_embd.weight"):
            fixed += size
    return {"fixed": fixed, "layers": layers, "kv": kv}


def predict(
    path: str | os.PathLike[str], bandwidth: float, masks: Sequence[Sequence[int]], contexts: Sequence[int]
) -> list[dict[str, Any]]:
    """Tokens a second when ``bandwidth`` GB/s are all that counts.

    ``masks`` are lists of layers left out; ``contexts`` numbers of tokens in the cache. Returns one
    {"context", "layers_skipped", "skipped", "bytes", "tokens_per_s", "speedup"} for each pair of them, the speedup
    being against all layers at the same context. Raises InputError.
    """
    read = token_bytes(path)
    n_layer = len(read["layers"])

    def total(gone: Sequence[int], context: int) -> float:
        kept = (layer for layer in range(n_layer) if layer not in gone)
        return read["fixed"] + sum(read["layers"][layer] + context * read["kv"][layer] for layer in kept)

    return [
        {
            "context": context,
            "layers_skipped": len(gone),
            "skipped": len(gone) / n_layer,
            "bytes": round(total(gone, context)),
            "tokens_per_s": 1e9 * bandwidth / total(gone, context),
            "speedup": total((), context) / total(gone, context),
        }
        for context in contexts
        for gone in masks
    ]
