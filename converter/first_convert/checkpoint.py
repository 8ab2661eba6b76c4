"""A Hugging Face checkpoint folder, looked at without loading it: config, shards, tensor names and shapes."""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfirst.errors import InputError
from pyfirst.recipe import ADAPTER_CONFIG_NAME, CONFIG_NAME, read_json, unique

BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_TOKENIZER = re.compile(r"tok|vocab|merges|spiece|sentencepiece|tekken", re.IGNORECASE)
# Heads and embeddings by the names that transformers' models use.
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# The main sizes by the keys that models have for them, and what none exceeds.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_LIMITS = ((_LAYERS, 10_000), (_WIDTH, 1 << 20), (("vocab_size",), 1 << 22))
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


@dataclass
class Tensor:
    """One tensor of a safetensors file: dtype as the file names it, shape, and where its bytes are."""

    dtype: str
    shape: list[int]
    path: Path
    start: int
    size: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> bytes:
        """The raw bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def is_tokenizer(name: str) -> bool:
    """Whether a file of a model folder belongs to its tokenizer, the chat template included."""
    return name.startswith("chat_template") or _TOKENIZER.search(name) is not None


def _family(activation: str) -> str:
    """One name for an activation and its approximations."""
    return "gelu" if activation.startswith("gelu") else activation.replace("swish", "silu")


def safetensors_header(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, which fill it without overlaps. Raises InputError naming the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100 << 20):
                raise InputError(f"{path}: cut short or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
                raise ValueError(f"'{name}' has shape {shape} and offsets {[first, last]}")
            tensor = Tensor(dtype, shape, path, 8 + length + first, last - first)
            if dtype not in BYTES:
                raise InputError(f"{path}: '{name}' is of type {dtype}, expected one of {', '.join(BYTES)}")
            if tensor.size != BYTES[dtype] * tensor.count:
                raise InputError(f"{path}: '{name}' is {tensor.size} bytes, not {dtype} {shape}")
            tensors[name] = tensor
    except FileNotFoundError:
        raise InputError(f"{path}: not found, the checkpoint is not complete; download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise InputError(f"{path}: '{name}' begins at byte {tensor.start}, expected {end}; download the file again")
        end += tensor.size
    if size != end:
        raise InputError(f"{path}: {size} bytes, expected {end}; the download is not complete")
    return tensors


class Checkpoint:
    """A local model folder.

    Attributes:
        path: the folder.
        config: config.json as it is; text_config: the same with the language part of a multimodal model on top.
        tensors: name -> Tensor of all safetensors shards; empty for a PyTorch .bin checkpoint.
    """

    def __init__(self, path: str | Path):
        """Check that the folder is a whole model. Raises InputError naming the file at fault."""
        self.path = path = Path(path)
        if path.is_file():
            option = "--base-gguf" if path.suffix == ".gguf" else "its folder"
            raise InputError(f"{path}: a file, expected a model folder; give {option} instead")
        if not path.is_dir():
            raise InputError(f"{path}: no such folder")
        if not (path / "config.json").is_file():
            if (path / CONFIG_NAME).is_file():
                raise InputError(f"{path}: a recipe, not a model; give it with --first, and its base as MODEL_DIR")
            if (path / ADAPTER_CONFIG_NAME).is_file():
                raise InputError(f"{path}: a LoRA adapter, not a model; give it with --lora, and its base as MODEL_DIR")
            raise InputError(f"{path}: no config.json, so not a Hugging Face model folder")
        self.config = read_json(path / "config.json")
        text_config = self.config.get("text_config") or {}
        if not isinstance(text_config, dict):
            raise InputError(f"{path / 'config.json'}: 'text_config' is {text_config!r}, expected an object")
        self.text_config = {**self.config, **text_config}
        for keys, limit in _LIMITS:
            key = next((key for key in keys if self.text_config.get(key) is not None), keys[0])
            value = self.text_config.get(key)
            if value is not None and (type(value) is not int or not 0 < value <= limit):
                raise InputError(
                    f"{path / 'config.json'}: '{key}' is {value!r}, expected a whole number from 1 to {limit}"
                )
        self.tensors = self._index()

    def _index(self) -> dict[str, Tensor]:
        # In transformers' order: what else lies in the folder is not this model.
        whole, index_path = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        weight_map: dict[str, str] = {}
        if whole.is_file():
            files = [whole]
        elif index_path.is_file():
            found = read_json(index_path).get("weight_map")
            weight_map = found if isinstance(found, dict) else {}
            names = list(weight_map.values())
            if not names or not all(isinstance(name, str) for name in names):
                raise InputError(f"{index_path}: no 'weight_map' of file names; download the checkpoint again")
            files = [self.path / name for name in sorted(set(names))]
        else:
            files = self._shards("model", "safetensors")
        tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in safetensors_header(file).items():
                if name in tensors:
                    raise InputError(f"{file}: '{name}' is in {tensors[name].path.name} too; one of them is stale")
                if weight_map and self.path / weight_map.get(name, "") != file:
                    raise InputError(f"{file}: '{name}' is not what {index_path.name} lists there; download them again")
                tensors[name] = tensor
        for name, shard in weight_map.items():
            if name not in tensors:
                raise InputError(f"{self.path / shard}: lacks '{name}', which {index_path.name} lists")
        if files:
            return tensors
        binaries = [self.path / "pytorch_model.bin"]
        binaries = binaries if binaries[0].is_file() else self._shards("pytorch_model", "bin")
        if not binaries:
            raise InputError(f"{self.path}: no weights (model.safetensors, pytorch_model.bin) in the folder")
        for file in sorted(self.path.glob("pytorch_model*.bin")):
            if file not in binaries:  # llama.cpp's converter reads them all
                raise InputError(f"{file}: lies beside {binaries[0].name}; move away what is not the model's")
            if not zipfile.is_zipfile(file):
                raise InputError(f"{file}: cut short or not a PyTorch checkpoint; download it again")
        return {}

    def _shards(self, stem: str, suffix: str) -> list[Path]:
        """The files "stem-1-of-N.suffix", none or all N. Raises InputError."""
        pattern = re.compile(rf"{stem}-\d+-of-(\d+)\.{suffix}")
        found = {path: match for path in self.path.iterdir() if (match := pattern.fullmatch(path.name))}
        for match in found.values():
            if int(match[1]) != len(found):
                raise InputError(f"{self.path}: {len(found)} of {int(match[1])} shards found, download again")
        return sorted(found)

    def number(self, *keys: str) -> int:
        """The first of ``keys`` in the (text) configuration. Raises InputError when none is there."""
        for key in keys:
            value = self.text_config.get(key)
            if isinstance(value, int):
                return value
        raise InputError(f"{self.path / 'config.json'}: none of {', '.join(keys)} found")

    @property
    def block_count(self) -> int:
        """Number of layers."""
        return self.number(*_LAYERS)

    @property
    def embedding_length(self) -> int:
        """Width of the residual stream."""
        return self.number(*_WIDTH)

    @property
    def quantization(self) -> str | None:
        """How the checkpoint's own weights are quantised ("bitsandbytes", ...), or None."""
        config = self.config.get("quantization_config") or self.text_config.get("quantization_config")
        return (config.get("quant_method") or "unknown") if isinstance(config, dict) else None

    @property
    def element_count(self) -> int:
        """Number of weights; for .bin files as if they held 16 bits each."""
        if self.tensors:
            return sum(t.count for t in self.tensors.values())
        return sum(p.stat().st_size for p in self.path.glob("pytorch_model*.bin")) // 2

    @property
    def embedding(self) -> Tensor | None:
        """The input embeddings, None where they go by a name that is not known here."""
        return next((tensor for name, tensor in self.tensors.items() if EMBEDDING.search(name)), None)

    def native_type(self) -> str:
        """The narrowest of f16, bf16 and f32 that holds every tensor without loss."""
        kinds = {t.dtype for t in self.tensors.values() if len(t.shape) > 1}
        return {frozenset(["F16"]): "f16", frozenset(["BF16"]): "bf16"}.get(frozenset(kinds), "f32")

    def transformers_config(self) -> Any:
        """transformers' configuration, None for a kind of model that only other code knows.

        Raises InputError naming config.json, where it is not valid or asks for another activation than llama.cpp has.
        """
        from transformers import CONFIG_MAPPING, AutoConfig

        path = self.path / "config.json"
        if str(self.config.get("model_type")) not in CONFIG_MAPPING:
            return None
        try:
            config = AutoConfig.from_pretrained(self.path, local_files_only=True)
            text = config.get_text_config()
            usual = type(text)()
        except Exception as error:  # from a validator's own kinds to an AttributeError of a wrong type
            if "auto_map" in self.config:
                return None
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: transformers cannot read it ({type(error).__name__}: {reason[:300]})") from None
        # llama.cpp has one activation per architecture and does not look here.
        for key in _ACTIVATIONS if "CausalLM" in str(self.config.get("architectures")) else ():
            found, wanted = getattr(text, key, None), getattr(usual, key, None)
            if isinstance(found, str) and isinstance(wanted, str) and _family(found) != _family(wanted):
                raise InputError(f"{path}: '{key}' is '{found}', but llama.cpp computes this kind with '{wanted}'")
        return config

    def check_complete(self) -> None:
        """Raise InputError where the kind, the tokenizer, or the output matrix of a model not tied is missing."""
        kinds = self.config.get("architectures") or self.text_config.get("architectures")
        if not (isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds)):
            if "ssm_cfg" not in self.config:  # the first Mamba has no such key
                path = self.path / "config.json"
                raise InputError(f"{path}: 'architectures' is {kinds!r}, expected a list such as ['LlamaForCausalLM']")
            kinds = []
        if not any(_TOKENIZER.search(path.name) for path in self.path.iterdir()):
            raise InputError(f"{self.path}: no tokenizer (tokenizer.json, tokenizer.model, ...); download it again")
        # llama.cpp would take the embeddings for the output matrix, and say nothing.
        embedding = self.embedding
        if self.text_config.get("tie_word_embeddings") is not False or embedding is None:
            return
        if "CausalLM" in " ".join(kinds) and [t.shape for t in self.tensors.values()].count(embedding.shape) == 1:
            raise InputError(
                f"{self.path}: tie_word_embeddings is false, but no output matrix (lm_head.weight) is in the files; "
                "download it again, or set tie_word_embeddings to true"
            )

    def tied_copy(self) -> str | None:
        """Name of an output matrix that is stored although tied, None without one.

        Raises InputError when it differs from the embeddings: the config then contradicts the weights.
        """
        if not self.text_config.get("tie_word_embeddings", False):
            return None
        head = next((n for n in self.tensors if HEAD.search(n)), None)
        embedding = next((n for n in self.tensors if EMBEDDING.search(n)), None)
        if head is None or embedding is None:
            return None
        if self.tensors[head].read() != self.tensors[embedding].read():
            raise InputError(
                f"{self.path}: tie_word_embeddings is set, but '{head}' differs from '{embedding}'; "
                "set tie_word_embeddings to false to keep both, or remove the one that is wrong"
            )
        return head


def local_folder(name: str | Path, *, weights: bool) -> Path:
    """A folder as it is, or the local copy of a Hub repository "owner/name", fetched when needed.

    ``weights``: a model, of which only config, tokenizer, card and weights are fetched; else a recipe or an adapter.
    A folder that exists never touches the network. Raises InputError.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        return path
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "*.safetensors"]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=patterns if weights else None))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # the Hub's client has a dozen kinds, down to the HTTP library's own
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: no such folder, and not from the Hugging Face Hub ({reason[:200]})") from None
