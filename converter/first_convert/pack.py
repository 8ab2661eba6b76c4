"""FiRST's routers as GGUF metadata: the keys, and files rewritten with or without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from first_convert.upstream import gguf
from pyfirst import metadata as key
from pyfirst.errors import InputError
from pyfirst.recipe import Recipe


class Entry(NamedTuple):
    """One key-value pair; ``kind`` is a GGUFValueType name, ``item`` the one of an array's items."""

    name: str
    kind: str
    value: Any
    item: str | None = None


def entries(recipe: Recipe, lora: dict[str, Any] | None = None) -> list[Entry]:
    """All first.* pairs of a recipe; ``lora`` is the adapter_config.json of the merged adapter.

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
        Entry(
            key.CALIBRATION_THRESHOLD, "ARRAY", list(map(float, config.calibration["threshold"])), "FLOAT32"
        ),
        Entry(key.CALIBRATION_KEPT, "ARRAY", list(map(float, config.calibration["kept"])), "FLOAT32"),
        Entry(key.LORA_MERGED, "BOOL", lora is not None),
    ]
    if lora is not None:
        targets = lora.get("target_modules") or []
        targets = [targets] if isinstance(targets, str) else sorted(targets)
        found += [
            Entry(key.LORA_RANK, "UINT32", int(lora["r"])),
            Entry(key.LORA_ALPHA, "FLOAT32", float(lora["lora_alpha"])),
            Entry(key.LORA_TARGETS, "ARRAY", targets, "STRING"),
        ]
    return [entry for entry in found if entry.kind != "ARRAY" or entry.value]


def add(writer: Any, found: list[Entry]) -> None:
    """Put the pairs into a GGUFWriter."""
    types = gguf().GGUFValueType
    for entry in found:
        item = types[entry.item] if entry.item else None
        writer.add_key_value(entry.name, entry.value, types[entry.kind], item)


def describe(metadata: Any, recipe: Recipe, base_model: str) -> None:
    """Fill a gguf Metadata with what the standard general.* keys should say of a FiRST model."""
    metadata.tags = [*(metadata.tags or []), *(tag for tag in key.TAGS if tag not in (metadata.tags or []))]
    metadata.finetune = metadata.finetune or "first"
    name = recipe.config.base_model or base_model
    if name:
        organisation, _, model = name.rpartition("/")
        entry = {"name": model.replace("-", " ").replace("_", " ")}
        if organisation and "/" not in organisation and organisation not in (".", ".."):
            entry |= {"organization": organisation, "repo_url": f"https://huggingface.co/{name}"}
        metadata.base_models = [entry]


def open_gguf(path: str | Path) -> Any:
    """A GGUFReader over one whole, unsplit file. Raises InputError naming the fault."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        reader = gguf().GGUFReader(path)
        split = reader.get_field("split.count")
        count = split.contents() if split else 0
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise InputError(f"{path}: cut short or not a GGUF file ({error})") from None
    if count > 1:
        raise InputError(f"{path}: one of {count} pieces; join them first with llama-gguf-split --merge")
    end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    if path.stat().st_size < end:
        raise InputError(f"{path}: {path.stat().st_size} bytes, its tensors need {end}; it is cut short")
    return reader


def value(reader: Any, name: str, default: Any = None) -> Any:
    """The value of a key in a GGUFReader, ``default`` when it is absent."""
    field = reader.get_field(name)
    return default if field is None else field.contents()


def check_shape(reader: Any, path: str | Path, recipe: Recipe) -> None:
    """Raise InputError, naming both numbers, when the recipe is for another depth or width."""
    architecture = value(reader, "general.architecture", "")
    config = recipe.config
    for name, wanted in (("block_count", config.block_count), ("embedding_length", config.embedding_length)):
        found = value(reader, f"{architecture}.{name}")
        if found != wanted:
            raise InputError(f"{path}: {architecture}.{name} is {found}, the recipe was trained for {wanted}")


def rewrite(
    reader: Any, out: str | Path, found: list[Entry], keep: Callable[[str], bool], tags: bool | None = None
) -> int:
    """Copy a GGUF with its tensors byte for byte, minus the keys that ``keep`` rejects, plus ``found``.

    ``tags``: True adds FiRST's tags to general.tags, False removes them. Returns the bytes written.
    """
    lib = gguf()
    architecture = value(reader, "general.architecture", "")
    writer = lib.GGUFWriter(out, arch=architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    types = lib.GGUFValueType
    old_tags = list(value(reader, "general.tags", []))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or not keep(field.name):
            continue
        if field.name == "general.tags" and tags is not None:
            continue
        item = field.types[-1] if field.types[0] == types.ARRAY else None
        content = field.contents()
        if item is not None and not content:
            continue  # an empty array, which the writer cannot write and readers take for absent
        writer.add_key_value(field.name, content, field.types[0], item)
    if tags is not None:
        kept = [tag for tag in old_tags if tag not in key.TAGS] + (list(key.TAGS) if tags else [])
        if kept:
            writer.add_key_value("general.tags", kept, types.ARRAY, types.STRING)
    add(writer, found)
    for tensor in reader.tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
    writer.close()
    return Path(out).stat().st_size


def pack(base: str | Path, out: str | Path, recipe: Recipe) -> dict[str, Any]:
    """Copy ``base`` to ``out`` with the routers in it, replacing any that it held. Raises InputError."""
    if recipe.adapter_dir is not None:
        raise InputError(
            f"{recipe.adapter_dir}: the recipe holds a LoRA, which cannot be merged into an existing GGUF; "
            "convert from the Hugging Face model folder (MODEL_DIR) instead"
        )
    reader = open_gguf(base)
    check_shape(reader, base, recipe)
    replaced = reader.get_field(key.VERSION) is not None
    rewrite(reader, out, entries(recipe), lambda name: not name.startswith("first."), tags=True)
    return {"tensors": len(reader.tensors), "replaced_routers": replaced}


def strip(base: str | Path, out: str | Path) -> dict[str, Any]:
    """Copy ``base`` to ``out`` without routers, tensors as they are. Raises InputError if there are none."""
    reader = open_gguf(base)
    if not any(name.startswith("first.") for name in reader.fields):
        raise InputError(f"{base}: holds no FiRST routers, so there is nothing to remove")
    rewrite(reader, out, [], lambda name: not name.startswith("first."), tags=False)
    return {"tensors": len(reader.tensors)}
