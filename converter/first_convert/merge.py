"""LoRA into checkpoint weights, tensor by tensor: PEFT does each merge in float32, one weight in memory.

The model is built on torch's meta device, so nothing but the adapter is loaded. PEFT wraps it exactly as in
training and says which tensors the adapter must hold; anything left over or missing stops the conversion.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from first_convert.checkpoint import EMBEDDING, HEAD, Checkpoint, safetensors_header
from pyfirst.errors import InputError
from pyfirst.recipe import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_json

Read = Callable[[str], torch.Tensor]
PREFIX = "base_model.model."

# Options under which W + BA alone is not the trained model; named in the refusal.
REFUSED = {
    "layer_replication": "the adapter repeats layers of its base",
    "alora_invocation_tokens": "an activated LoRA is switched on by tokens and cannot be merged",
    "use_qalora": "QALoRA needs its quantised base",
    "use_bdlora": "BD-LoRA is for serving only",
    "arrow_config": "Arrow routes between adapters and cannot be merged",
    "kasa_config": "KaSA changes its base weights",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "megatron_config": "Megatron layers are not in a Hugging Face checkpoint",
    "target_parameters": "adapters on bare parameters (fused experts) are not supported",
    "ensure_weight_tying": "tying adapters is not supported",
}
# Which of the base's own biases were trained: the adapter brings them whole.
BIASES = ("none", "all", "lora_only")
# These change the base weights when the adapter is made, so the plain base is the wrong one to merge into.
REFUSED_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 16


def _scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < abs(value) < 1e30  # NaN is not


def _names(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(type(x) is str for x in value))


def _each(usable: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The check of an object, by that of its values."""
    return lambda value: isinstance(value, dict) and all(map(usable, value.values()))


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


# Key of adapter_config.json, whether PEFT can use a value, and what it can use; it does not check them itself.
_VALUES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("r", _rank, "a whole number from 1 to 65536"),
    ("rank_pattern", _each(_rank), "an object of whole numbers from 1 to 65536"),
    ("lora_alpha", _scale, "a finite number that is not 0"),
    ("alpha_pattern", _each(_scale), "an object of finite numbers that are not 0"),
    *((key, _names, "names") for key in ("target_modules", "modules_to_save", "exclude_modules")),
    (
        "trainable_token_indices",
        lambda value: value is None or _tokens(value) or _each(_tokens)(value),
        "token ids, or an object of them",
    ),
)


@dataclass
class Merge:
    """What an adapter does to a checkpoint.

    Attributes:
        config: adapter_config.json as it is.
        pairs, pairs_used: A/B pairs in the adapter's file, and in the layers that they are merged into.
        saved: whole tensors that the adapter brings, by their name in the checkpoint.
        modules: name of a changed tensor in the checkpoint -> (shape, function from a reader of base tensors
            to the merged float32 tensor). Has tensors that the checkpoint lacks when a tied head is untied.
        untied: whether the output matrix was tied and now differs from the embeddings.
        vocabulary: rows of the embeddings that the adapter brings, None where the base has as many.
    """

    config: dict[str, Any]
    pairs: int
    pairs_used: int = 0
    saved: list[str] = field(default_factory=list)
    modules: dict[str, tuple[tuple[int, ...], Callable[[Read], torch.Tensor]]] = field(default_factory=dict)
    untied: bool = False
    vocabulary: int | None = None


def check_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA that can be merged. Raises InputError naming the key that forbids it."""
    path = directory / ADAPTER_CONFIG_NAME
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is {kind!r}, only LORA can be merged")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise InputError(f"{path}: '{key}' is set: {reason}")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(REFUSED_INIT):
        raise InputError(
            f"{path}: init_lora_weights is {init!r}, which changed the base weights; save the adapter with "
            "path_initial_model_for_weight_conversion to turn it into a plain LoRA"
        )
    if config.get("bias", "none") not in BIASES:
        raise InputError(f"{path}: bias is {config['bias']!r}, expected one of {', '.join(BIASES)}")
    for key, usable, expected in _VALUES:
        if key in config and not usable(config[key]):
            raise InputError(f"{path}: '{key}' is {config[key]!r}, expected {expected}")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise InputError(f"{path}: required key '{key}' is missing")
    return config


def _known(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys that this PEFT knows; a key of a newer one that is set stops the merge."""
    import peft

    names = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    unknown = [key for key, value in config.items() if key not in names and value]
    if unknown:
        raise InputError(f"{path}: unknown key '{unknown[0]}' (peft {peft.__version__}); a newer peft may know it")
    return {key: value for key, value in config.items() if key in names}


def load_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of an adapter in float32 by key. Raises InputError for a short file or values not finite."""
    path = directory / ADAPTER_WEIGHTS_NAME
    if path.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load

        safetensors_header(path)
        try:
            tensors = load(path.read_bytes())  # safetensors' own open takes only UTF-8 paths
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    elif (directory / "adapter_model.bin").is_file():
        path = directory / "adapter_model.bin"
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{path}: not a readable PyTorch file ({error})") from None
    else:
        raise InputError(f"{path}: not found, although the folder holds {ADAPTER_CONFIG_NAME}")
    if not (isinstance(tensors, dict) and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())):
        raise InputError(f"{path}: not the weights of an adapter, expected tensors by name")
    tensors = {key: tensors[key].float() for key in sorted(tensors)}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: '{key}' holds NaN or infinity")
    return tensors


def _vocabulary(found: dict[str, torch.Tensor], checkpoint: Checkpoint) -> int | None:
    """Rows of the embeddings or the head that an adapter holds whole, where the base has another number."""
    base = checkpoint.embedding
    for key, tensor in found.items():
        name = re.sub(r"\.(base_layer|modules_to_save|original_module)\.", ".", key)
        if (HEAD.search(name) or EMBEDDING.search(name)) and base is not None and tensor.shape[0] != base.shape[0]:
            return int(tensor.shape[0])
    return None


def meta_model(checkpoint: Checkpoint, vocabulary: int | None = None) -> nn.Module:
    """The checkpoint's model on the meta device, without weights. Raises InputError.

    ``vocabulary``: number of tokens, where it is not the configuration's.
    """
    import transformers

    config = checkpoint.transformers_config()
    try:
        config = config or transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        if vocabulary is not None:
            config.get_text_config().vocab_size = vocabulary
        name = (config.architectures or [""])[0]
        cls = getattr(transformers, name, transformers.AutoModelForCausalLM)
        build = getattr(cls, "_from_config", None) or cls.from_config
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # whatever a model's code makes of a configuration that does not fit
        raise InputError(f"{checkpoint.path}: transformers cannot build this model ({error})") from None


def _canonical(key: str) -> str:
    """An adapter key without what compilers, wrappers and multimodal parents put in front of it."""
    key = key.replace("_orig_mod.", "").replace(".default.", ".").removesuffix(".default")
    key = re.sub(rf"^(module\.|{re.escape(PREFIX)})+", "", key)
    key = key.replace("language_model.", "")
    return re.sub(r"^(model\.)+", "model.", key)


def _pairs(keys: Iterable[str]) -> int:
    """A/B pairs among the keys of an adapter."""
    return sum(bool(re.search(r"lora_(embedding_)?A(\.|$)", key)) for key in keys)


def _match(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], base: dict[str, str], path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split an adapter into (what PEFT expects, by its keys; whole base weights, by parameter name).

    ``base``: parameter name with the wrapper's ``base_layer`` in it -> plain name.
    """
    # With a vocabulary that grew, PEFT writes saved modules twice.
    twice = {key: key.replace(".modules_to_save.", ".") for key in found if ".modules_to_save." in key}
    found = {
        key: tensor
        for key, tensor in found.items()
        if key not in twice or twice[key] not in found or not torch.equal(tensor, found[twice[key]])
    }
    by_canonical = {_canonical(key): key for key in expected}
    base_by_canonical = {_canonical(key): name for key, name in base.items()}
    adapter: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    unmatched = []
    for key, tensor in found.items():
        name = _canonical(key)
        target = key if key in expected else by_canonical.get(name)
        if target is not None and target not in adapter:
            adapter[target] = tensor
        elif target is None and name in base_by_canonical:
            whole[base_by_canonical[name]] = tensor
        else:
            unmatched.append(key)

    missing = [key for key in expected if key not in adapter]
    total = max(_pairs(found), 1)
    if unmatched:
        shown = ", ".join(unmatched[:4]) + (f" and {len(unmatched) - 4} more" if len(unmatched) > 4 else "")
        raise InputError(
            f"{path}: {_pairs(adapter)} of {_pairs(found)} adapter pairs fit this model; unmatched: {shown}"
        )
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise InputError(
            f"{path}: {_pairs(adapter)} of {total} adapter pairs found, but the model also needs: {shown}; "
            "the adapter was trained on another model or is not complete"
        )
    for key, tensor in adapter.items():
        if tensor.shape != expected[key].shape:
            raise InputError(
                f"{path}: '{key}' is {list(tensor.shape)}, this model needs {list(expected[key].shape)}; "
                "the adapter was trained on another model"
            )
    return adapter, whole


def _copy(tensor: torch.Tensor, read: Read) -> torch.Tensor:
    """A tensor that the adapter brings, whatever the base holds."""
    return tensor.detach().float().clone()


def plan(checkpoint: Checkpoint, directory: str | Path) -> Merge:
    """Work out what the adapter in ``directory`` does to the checkpoint; nothing of the base is loaded.

    Raises InputError when any part of the adapter would not be used, does not fit, or cannot be merged.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    directory = Path(directory)
    path, settings_path = directory / ADAPTER_WEIGHTS_NAME, directory / ADAPTER_CONFIG_NAME
    raw = check_config(directory)
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.path}: the weights are quantised ({checkpoint.quantization}); merging needs the "
            "unquantised base model"
        )
    if not checkpoint.tensors:
        raise InputError(f"{checkpoint.path}: merging needs a safetensors checkpoint, not PyTorch .bin files")
    settings = _known(raw, settings_path)
    # Trained biases are whole weights of the base, taken from the file below.
    settings |= {"init_lora_weights": True, "inference_mode": True, "lora_dropout": 0.0, "bias": "none"}
    settings.pop("peft_type")
    found = load_adapter(directory)
    vocabulary = _vocabulary(found, checkpoint)
    trained = raw.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    last = max((token for ids in lists for token in ids), default=0)
    rows = vocabulary or (checkpoint.embedding.shape[0] if checkpoint.embedding else None)
    if rows is not None and last >= rows:
        raise InputError(f"{settings_path}: 'trainable_token_indices' has token {last}, the model has {rows} tokens")
    model: Any = meta_model(checkpoint, vocabulary)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    embedding_name, head_name = names[id(embedding)] + ".weight", names.get(id(head), "") + ".weight"
    tied = head is not None and head.weight is embedding.weight

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.get_peft_model(
                model, peft.LoraConfig(**settings), low_cpu_mem_usage=True, autocast_adapter_dtype=False
            )
        except Exception as error:  # PEFT takes its configuration at its word
            raise InputError(f"{settings_path}: {error}") from None
        # A tied head with its own adapter is no longer tied; its base is the embeddings all the same.
        inner: Any = wrapped.base_model.model
        expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        plain = {
            PREFIX + name: name.replace(".base_layer.", ".")
            .replace(".original_module.", ".")
            .replace(".token_adapter.", ".")
            for name, _ in inner.named_parameters(remove_duplicate=False)
            if "lora_" not in name and "modules_to_save" not in name and "trainable_tokens" not in name
        }
        shapes = {
            plain[PREFIX + name]: parameter.shape
            for name, parameter in inner.named_parameters(remove_duplicate=False)
            if PREFIX + name in plain
        }
        plain |= {PREFIX + name: name for name in plain.values()}
        adapter, whole = _match(found, expected, plain, path)
        for name, tensor in whole.items():
            if tensor.shape != shapes[name]:
                raise InputError(f"{path}: '{name}' is {list(tensor.shape)}, the model's is {list(shapes[name])}")
        tuners: dict[str, Any] = {
            n: module for n, module in inner.named_modules() if isinstance(module, BaseTunerLayer)
        }
        if tied and raw.get("trainable_token_indices") and head_name.removesuffix(".weight") in tuners:
            reason = f"cannot be merged with a LoRA on '{head_name}', which is tied"
            raise InputError(f"{settings_path}: 'trainable_token_indices' {reason}")
        for module in tuners.values():  # PEFT moves an adapter to where its base is: make that the CPU
            module.get_base_layer().weight = nn.Parameter(torch.empty(0), requires_grad=False)
            for original in getattr(module, "trainable_tokens_original", {}):
                module.trainable_tokens_original[original] = torch.empty(0)
        # Trained tokens of tied embeddings reach the head as well: it stays tied.
        if raw.get("bias", "none") != "none":
            trained = [name for name in shapes if name.endswith(".bias")]
            if raw["bias"] == "lora_only":
                trained = [name for name in trained if name.removesuffix(".bias") in tuners]
            if lost := [name for name in trained if name not in whole]:
                raise InputError(f"{path}: bias is {raw['bias']!r}, but the adapter lacks {', '.join(lost[:4])}")
        followers = [name for name, module in tuners.items() if getattr(module, "tied_adapter", None)]
        tuners = {name: module for name, module in tuners.items() if name not in followers}
        result: Any = peft.set_peft_model_state_dict(wrapped, adapter, low_cpu_mem_usage=True)
    if result.unexpected_keys:
        raise InputError(f"{path}: PEFT did not use {', '.join(result.unexpected_keys[:4])}")

    merge = Merge(raw, _pairs(found), vocabulary=vocabulary)

    prefix = getattr(model, "base_model_prefix", "") + "."
    by_canonical = {_canonical(key): key for key in checkpoint.tensors}

    def in_file(name: str) -> str | None:
        """A parameter's name in the files: with or without the prefix, or in a multimodal parent's order."""
        same = (key for key in (name, name.removeprefix(prefix), prefix + name) if key in checkpoint.tensors)
        return next(same, by_canonical.get(_canonical(name)))

    def stored(name: str) -> str:
        """Where the base tensor of a parameter is; a tied head's is the embeddings."""
        found_name = in_file(name)
        if found_name is None and tied and name == head_name:
            found_name = in_file(embedding_name)
        if found_name is None:
            raise InputError(f"{checkpoint.path}: no tensor '{name}', which the adapter changes, under that name")
        return found_name

    def reader(name: str) -> Callable[[Read], torch.Tensor]:
        """A copy of a parameter's base values, float32; the adapter's own where it brings one."""
        for brought in (name, embedding_name if tied and name == head_name else name):
            if brought in whole:
                return functools.partial(_copy, whole[brought])
        source = stored(name)
        return lambda read: read(source).float()

    def put(name: str, shape: tuple[int, ...], compute: Callable[[Read], torch.Tensor]) -> None:
        target = in_file(name)
        if target is None and not (tied and name == head_name):
            stored(name)
        merge.modules[target or name] = (tuple(shape), compute)

    if tied and torch.equal(whole.get(head_name, torch.empty(0)), whole.get(embedding_name, torch.empty(1))):
        whole.pop(head_name)  # one matrix, written twice
    for name, tensor in whole.items():
        put(name, tensor.shape, reader(name))
        merge.saved.append(name)
    # Embeddings that come whole serve a tied head too, unless an adapter is on top of either.
    untouched = {name: entry for name, entry in merge.modules.items() if name != head_name}
    for name, module in inner.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter, tensor in module.modules_to_save["default"].named_parameters():
                put(f"{name}.{parameter}", tensor.shape, functools.partial(_copy, tensor))
                merge.saved.append(f"{name}.{parameter}")
    for name, module in tuners.items():
        name = name.removesuffix(".token_adapter")
        base = module.get_base_layer()
        read_weight = reader(f"{name}.weight")
        has_bias = getattr(base, "bias", None) is not None
        if raw.get("lora_bias") and not has_bias:
            raise InputError(f"{settings_path}: 'lora_bias' is set, but '{name}' has no bias to merge into")
        read_bias = reader(f"{name}.bias") if has_bias else None

        def compute(
            read: Read,
            part: str = "weight",
            module: Any = module,
            weight: Callable[[Read], torch.Tensor] = read_weight,
            bias: Callable[[Read], torch.Tensor] | None = read_bias,
        ) -> torch.Tensor:
            base = module.get_base_layer()
            base.weight = nn.Parameter(weight(read), requires_grad=False)
            if bias is not None:
                base.bias = nn.Parameter(bias(read), requires_grad=False)
            with torch.no_grad():
                module.merge()  # the reader gave a copy, so merging in place is safe
            merged = getattr(base, part).data
            module.merged_adapters.clear()
            base.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            return merged

        put(f"{name}.weight", tuple(shapes[f"{name}.weight"]), compute)
        merge.pairs_used += _pairs(key for key, _ in module.named_parameters())
        if has_bias and raw.get("lora_bias"):
            shape = tuple(shapes[f"{name}.bias"])
            put(f"{name}.bias", shape, functools.partial(compute, part="bias"))
    touched = {name for name, entry in merge.modules.items() if entry is not untouched.get(name)}
    if tied and touched & {head_name, in_file(embedding_name)} and not followers:
        merge.untied = head_name not in checkpoint.tensors
        if head_name not in merge.modules:
            put(head_name, tuple(shapes[embedding_name]), reader(head_name))
    if vocabulary is not None:
        for name in {embedding_name, embedding_name if tied and not merge.untied else head_name} & set(shapes):
            if in_file(name) not in merge.modules and name not in merge.modules:
                base = checkpoint.tensors[stored(name)].shape[0]
                raise InputError(
                    f"{path}: brings embeddings for {vocabulary} tokens, the base model has {base}, and the adapter "
                    f"lacks '{name}'; resize and save the base model first"
                )
    return merge


def summary(merge: Merge | None) -> dict[str, Any] | None:
    """The counts to report: {"pairs", "pairs_used", "modules", "saved", "untied", "vocabulary"}."""
    if merge is None:
        return None
    return {
        "pairs": merge.pairs,
        "pairs_used": merge.pairs_used,
        "modules": len(merge.modules),
        "saved": list(dict.fromkeys(merge.saved)),
        "untied": merge.untied,
        "vocabulary": merge.vocabulary,
    }
