"""Where a file came from: checksums of its inputs, versions of the tools, and the date when one is wanted."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from first_convert.checkpoint import Checkpoint, is_tokenizer
from first_convert.ggufio import Entry
from pyfirst import __version__
from pyfirst import metadata as key
from pyfirst.errors import InputError
from pyfirst.recipe import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CONFIG_NAME, ROUTERS_NAME

Source = tuple[str, str]  # name of an input such as "recipe/first_config.json", its sha256
EPOCH = "SOURCE_DATE_EPOCH"


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def text(name: str) -> str:
    """A file's name or path as UTF-8 text, whatever the locale."""
    return os.fsencode(name).decode("utf-8", "replace")


def sources(label: str, paths: Sequence[Path]) -> list[Source]:
    """("label/file name", checksum) of files; where they lay is nobody's business."""
    return [(f"{label}/{text(path.name)}", sha256(path)) for path in paths]


def checkpoint_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a model folder that decide what the GGUF holds: weights, configuration, tokenizer."""
    weights = {t.path for t in checkpoint.tensors.values()} or set(checkpoint.path.glob("pytorch_model*.bin"))
    names = ("config.json", "generation_config.json")
    others = {path for path in checkpoint.path.iterdir() if path.name in names or is_tokenizer(path.name)}
    return sorted(weights | {path for path in others if path.is_file()})


def recipe_files(directory: str | Path) -> list[Path]:
    """Configuration and routers of a recipe; its LoRA counts as an adapter."""
    return [Path(directory) / CONFIG_NAME, Path(directory) / ROUTERS_NAME]


def adapter_files(directory: str | Path) -> list[Path]:
    """Configuration and weights of a PEFT adapter."""
    names = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, "adapter_model.bin")
    found = [path for name in names if (path := Path(directory) / name).is_file()]
    return found[:2]


def recipe_name(given: str | Path) -> str:
    """A recipe by its Hub name as the user gave it, else by its folder."""
    path = Path(given)
    return text(path.resolve().name) if path.exists() else str(given)


def created(wanted: bool) -> str:
    """SOURCE_DATE_EPOCH, or the time if ``wanted``, as ISO 8601 in UTC; else nothing. Raises InputError."""
    text = os.environ.get(EPOCH, "")
    try:
        seconds = int(text) if text else None
        if seconds is None and not wanted:
            return ""
        moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc) if seconds is not None else None
    except (ValueError, OverflowError, OSError):
        raise InputError(f"{EPOCH} is '{text}', expected seconds since 1970") from None
    moment = moment or datetime.datetime.now(datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def llama_cpp_version() -> str:
    """Version of the llama.cpp that converts and quantises, and of the release that it is from."""
    import ctypes

    from pyfirst import native

    function = native.lib.llama_version
    function.restype = ctypes.c_char_p
    return f"{function().decode()} (llama-cpp-python {native.BINDINGS_VERSION})"


def _public(name: str) -> str:
    """A model's name without the folders that a path on somebody's disk begins with."""
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def entries(found: Sequence[Source], recipe: str = "", base_model: str = "", date: str = "") -> list[Entry]:
    """The pairs to write; what is empty gets none."""
    pairs = [
        Entry(key.RECIPE_NAME, "STRING", recipe),
        Entry(key.RECIPE_BASE_MODEL, "STRING", _public(base_model)),
        Entry(key.SOURCE_NAMES, "ARRAY", [name for name, _ in found], "STRING"),
        Entry(key.SOURCE_SHA256, "ARRAY", [checksum for _, checksum in found], "STRING"),
        Entry(key.MADE_PYFIRST, "STRING", __version__),
        Entry(key.MADE_LLAMA_CPP, "STRING", llama_cpp_version()),
        Entry(key.MADE_DATE, "STRING", date),
    ]
    return [entry for entry in pairs if entry.value]
