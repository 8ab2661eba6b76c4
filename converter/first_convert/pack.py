"""FiRST's routers as GGUF metadata: the keys, and files rewritten with or without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from first_convert import provenance
from first_convert.ggufio import Entry, Gguf, rewrite
from first_convert.upstream import gguf
from pyfirst import metadata as key
from pyfirst.errors import InputError, check_whole
from pyfirst.info import Header, mistyped, opened
from pyfirst.recipe import Recipe


def lora_entries(lora: dict[str, Any] | None) -> list[Entry]:
    """What became of a LoRA; ``lora`` is the adapter_config.json of the merged adapter."""
    found = [Entry(key.LORA_MERGED, "BOOL", lora is not None)]
    if lora is not None:
        targets = lora.get("target_modules") or []
        targets = [targets] if isinstance(targets, str) else sorted(targets)
        found += [
            Entry(key.LORA_RANK, "UINT32", int(lora["r"])),
            Entry(key.LORA_ALPHA, "FLOAT32", float(lora["lora_alpha"])),
            Entry(key.LORA_TARGETS, "ARRAY", targets, "STRING"),
        ]
    return [entry for entry in found if entry.kind != "ARRAY" or entry.value]


def entries(recipe: Recipe) -> list[Entry]:
    """The pairs that make a file route.

    GGUF writers refuse empty arrays, so an empty list is stored as no key.
    """
    config = recipe.config
    found = [
        Entry(key.VERSION, "UINT32", config.version),
        Entry(key.BLOCK_COUNT, "UINT32", config.block_count),
        Entry(key.EMBEDDING_LENGTH, "UINT32", config.embedding_length),
        Entry(key.ROUTER_WEIGHT, "ARRAY", recipe.weight.ravel().tolist(), "FLOAT32"),
        Entry(key.ROUTER_BIAS, "ARRAY", recipe.bias.tolist(), "FLOAT32"),
        Entry(key.ROUTER_NORM, "STRING", config.router_norm),
        Entry(key.ROUTER_THRESHOLD, "FLOAT32", float(config.threshold)),
        Entry(key.PREFILL, "STRING", config.prefill),
        Entry(key.WINDOW, "UINT32", config.window),
        Entry(key.PROTECTED, "ARRAY", sorted(set(config.protected)), "UINT32"),
        Entry(key.CALIBRATION_THRESHOLD, "ARRAY", list(map(float, config.calibration["threshold"])), "FLOAT32"),
        Entry(key.CALIBRATION_KEPT, "ARRAY", list(map(float, config.calibration["kept"])), "FLOAT32"),
    ]
    return [entry for entry in found if entry.kind != "ARRAY" or entry.value]


def add(writer: Any, found: list[Entry]) -> None:
    """Put the pairs into a GGUFWriter."""
    types = gguf().GGUFValueType
    for entry in found:
        item = types[entry.item] if entry.item else None
        writer.add_key_value(entry.name, entry.value, types[entry.kind], item)


def describe(metadata: Any, recipe: Recipe | None, base_model: str, cards: Sequence[Path] = ()) -> None:
    """Fill a gguf Metadata with what the standard general.* keys should say of a FiRST model.

    ``cards``: folders whose README.md names the licence where the model's own does not.
    """
    if recipe is not None:
        metadata.tags = [*(metadata.tags or []), *(tag for tag in key.TAGS if tag not in (metadata.tags or []))]
        metadata.finetune = metadata.finetune or "first"
    for folder in cards:
        try:
            metadata.license = metadata.license or type(metadata).load_model_card(folder).get("license")
        except Exception as error:  # of the YAML reader, which imports late
            reason = " ".join(str(error).split())
            raise InputError(f"{folder / 'README.md'}: what stands between the '---' is no YAML ({reason})") from None
    name = (recipe.config.base_model if recipe else "") or base_model
    if name:
        organisation, _, model = name.rpartition("/")
        entry = {"name": model.replace("-", " ").replace("_", " ")}
        if organisation and "/" not in organisation and organisation not in (".", ".."):
            entry |= {"organization": organisation, "repo_url": f"https://huggingface.co/{name}"}
        metadata.base_models = [entry]


def open_gguf(path: str | Path, check: Callable[[Header], None] | None = None) -> Gguf:
    """One whole, unsplit GGUF whose keys pass ``check``. Raises InputError naming the fault."""
    with opened(path) as header:  # llama.cpp's own reader refuses more, a key that is there twice
        if check is not None:
            check(header)
        source = Gguf(path)
    check_whole(source, path)
    return source


def open_base(path: str | Path, *, replace: bool) -> Gguf:
    """A GGUF whose routers are to ``replace``, or to remove. Raises InputError, also for keys of another type."""

    def check(header: Header) -> None:
        if replace and (wrong := mistyped(header)):
            raise InputError(f"{path}: {wrong[0]}; --strip removes all first.* keys")
        if (kind := header.kind("general.tags")) not in (None, "str[]"):
            raise InputError(f"{path}: general.tags is {kind}, expected str[]")

    return open_gguf(path, check)


def check_lora(recipe: Recipe) -> None:
    """Raise InputError when the recipe holds a LoRA: a GGUF's tensors stay as they are."""
    if recipe.adapter_dir is not None:
        raise InputError(
            f"{recipe.adapter_dir}: the recipe holds a LoRA, which cannot be merged into an existing GGUF; "
            "convert from the Hugging Face model folder (MODEL_DIR) instead"
        )


def check_shape(source: Gguf, path: str | Path, recipe: Recipe) -> None:
    """Raise InputError, naming both numbers, when the recipe is for another depth or width."""
    architecture = source.get("general.architecture", "")
    config = recipe.config
    for name, wanted in (("block_count", config.block_count), ("embedding_length", config.embedding_length)):
        found = source.get(f"{architecture}.{name}")
        if found != wanted:
            raise InputError(f"{path}: {architecture}.{name} is {found}, the recipe was trained for {wanted}")


def _plain(name: str) -> bool:
    return not name.startswith("first.") and name != "general.tags"


def _tags(source: Gguf, ours: bool) -> list[Entry]:
    tags = [tag for tag in source.get("general.tags", []) if tag not in key.TAGS]
    tags += key.TAGS if ours else ()
    return [Entry("general.tags", "ARRAY", tags, "STRING")] if tags else []


def _history(source: Gguf) -> list[provenance.Source]:
    """Checkpoint and adapter that the file's tensors came from, as an earlier conversion noted."""
    pairs = zip(source.get(key.SOURCE_NAMES, []), source.get(key.SOURCE_SHA256, []), strict=False)
    return [(name, checksum) for name, checksum in pairs if name.startswith(("checkpoint/", "adapter/"))]


def pack(
    base: str | Path, out: str | Path, recipe: Recipe, directory: str | Path, name: str, date: str = ""
) -> dict[str, Any]:
    """Copy ``base`` to ``out`` with the routers in it, replacing any that it held. Raises InputError.

    ``directory``, ``name``, ``date``: where the recipe is, what it is called and when this is, for provenance.
    """
    check_lora(recipe)
    source = open_base(base, replace=True)
    check_shape(source, base, recipe)
    merged = bool(source.get(key.LORA_MERGED))  # tensors stay, so a LoRA that is in them does too
    found = _history(source) + provenance.sources("base", [source.path])
    found += provenance.sources("recipe", provenance.recipe_files(directory))
    added = [*_tags(source, True), *entries(recipe), *([] if merged else lora_entries(None))]
    added += provenance.entries(found, name, recipe.config.base_model, date)
    lora = key.LORA_MERGED.removesuffix("merged")
    rewrite(source, out, added, lambda name: _plain(name) or (merged and name.startswith(lora)))
    return {"tensors": len(source.tensors), "replaced_routers": key.VERSION in source.keys}


def strip(base: str | Path, out: str | Path) -> dict[str, Any]:
    """Copy ``base`` to ``out`` without routers, tensors as they are. Raises InputError if there are none."""
    source = open_base(base, replace=False)
    if not any(name.startswith("first.") for name in source.keys):
        raise InputError(f"{base}: holds no FiRST routers, so there is nothing to remove")
    rewrite(source, out, _tags(source, False), _plain)
    return {"tensors": len(source.tensors)}
