"""llama.cpp's own converter and gguf-py, as installed beside our library.

Upstream's files stay unmodified. Added from here: config keys that transformers 5 stopped writing, and
pre-tokenizers known by their rules.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_RAW = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# llama.cpp's name for a pre-tokenizer -> what it does, in tokenizers' JSON
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": [_split(_LLAMA3), _RAW],
    "qwen2": [_split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), _RAW],
}

_ours: dict[str, ModuleType] = {}


@contextlib.contextmanager
def upstream() -> Iterator[None]:
    """Inside, imports come from upstream's tree, whatever ``gguf`` the environment holds. Raises ImportError."""
    from pyfirst.native import upstream_dir

    def owned() -> list[str]:
        return [n for n in sys.modules if n.partition(".")[0] in ("gguf", "conversion", "convert_hf_to_gguf")]

    foreign = {name: sys.modules.pop(name) for name in owned()}
    root, path = upstream_dir(), list(sys.path)
    sys.modules.update(_ours)
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    try:
        yield
    finally:
        sys.path[:] = path
        _ours.update({name: sys.modules.pop(name) for name in owned()})
        sys.modules.update(foreign)


def native() -> Any:
    """The llama_cpp module on top of pyfirst's library. Raises ImportError when pyfirst is not built."""
    import pyfirst.native  # noqa: F401  first, because it points llama_cpp at our library

    import llama_cpp  # isort: skip

    return llama_cpp


def gguf() -> Any:
    """Upstream's gguf-py package, also where another version of ``gguf`` is imported already."""
    if "gguf.quants" not in _ours:
        with upstream():
            import gguf.quants  # noqa: F401
    return _ours["gguf"]


_forced: list[str] = []  # the pre-tokenizer that the user names
by_rules: list[str] = []  # pre-tokenizers that upstream did not know in this process


def recognise(tokenizer: Any) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a transformers tokenizer, by its rules alone, or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    # llama.cpp leaves out Unicode's NFC for every byte-level model, qwen2 among them.
    if rules.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    if (rules.get("model") or {}).get("type") != "BPE":
        return None
    steps = rules.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    return next((name for name, known in PRE_TOKENIZERS.items() if steps == known), None)


def complete_hparams(config: dict[str, Any]) -> dict[str, Any]:
    """Add the config keys that upstream reads and transformers 5 no longer writes."""
    rope = config.get("rope_parameters") or {}
    if "n_positions" in config:
        config.setdefault("n_ctx", config["n_positions"])
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        config.setdefault("rotary_pct", rope["partial_rotary_factor"])
    if config.get("model_type") == "phi3" and rope and config.get("original_max_position_embeddings"):
        rope.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    return config


def _extend(base: Any) -> None:
    """Teach upstream's ``conversion.base`` module what it lacks (see the module's docstring)."""
    load_hparams, by_hash = base.ModelBase.load_hparams, base.TextModel.get_vocab_base_pre

    def load(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return complete_hparams(load_hparams(*args, **kwargs))

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        if _forced:
            return _forced[0]
        logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)  # its banner of advice is for its developers
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            name = recognise(tokenizer)
            if name is None:
                raise
            by_rules.append(name)
            return name
        finally:
            logging.getLogger("hf-to-gguf").setLevel(logging.NOTSET)

    base.ModelBase.load_hparams = staticmethod(load)
    base.TextModel.get_vocab_base_pre = get_vocab_base_pre


def convert_hf_to_gguf(argv: list[str], pre_tokenizer: str | None = None, prepare: Any = None) -> None:
    """Run upstream's converter with our additions in this process, with upstream's own arguments.

    ``prepare`` is called with upstream's ``conversion.base`` before anything is converted.
    """
    with upstream():
        fresh = "convert_hf_to_gguf" not in sys.modules
        import conversion.base
        import convert_hf_to_gguf as module

        if fresh:
            _extend(conversion.base)
        _forced[:] = [pre_tokenizer] if pre_tokenizer else []
        if prepare is not None:
            prepare(conversion.base)
        saved, sys.argv = sys.argv, ["convert_hf_to_gguf.py", *argv]
        try:
            module.main()
        finally:
            sys.argv = saved
