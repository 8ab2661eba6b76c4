"""Tiny random models, recipes and adapters for exact tests, and the plain torch forward that is their truth.

Everything is float32, made in-process from a seed, and takes seconds on one core::

    folder = tiny.make("llama", tmp / "llama")
    path = tiny.gguf(folder, tmp / "llama.gguf")
    logits = tiny.gold(folder, mask=[1, 0, 1, 1], prompt_ids=[5, 6, 7], next_ids=[8, 9], prefill="full")
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCAB = 384
WIDTH = 64
TEXT = (
    "the quick brown fox jumps over the lazy dog. In 2024 there were 365 days, and "
    "I'm sure that they've told you so. Съешь же ещё этих мягких французских булок, да выпей чаю. "
    "我能吞下玻璃而不伤身体。 日本語のテキストです。 🦙🙂🚀 "
    "def f(x):\n    return x + 1\n"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}

# name -> (transformers model type, configuration on top of _COMMON)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", dict(_GEMMA)),
    # llama.cpp fixes the pattern to five sliding layers, then a full one
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 7}),
    "phi3": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 512}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {"n_embd": WIDTH, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    "gptneox": ("gpt_neox", {"rotary_pct": 0.25, "use_parallel_residual": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "qwen3moe": ("qwen3_moe", {**_MOE, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": []}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}

# The same for what is trained only. Llama 4's layers without rotary embedding ask the cache for their position.
TORCH_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": (
        "llama4_text",
        {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 128, "floor_scale": 4, "attn_scale": 2.0},
    ),
}


@functools.cache
def tokenizer(size: int = VOCAB - 7, special: tuple[str, ...] = ()) -> Any:
    """A byte-level BPE tokenizer of ``size`` entries with GPT-2's pre-tokenizer, trained on ``TEXT``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    result.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return result


def _sentencepiece(directory: Path) -> None:
    """gemma2's converter wants a SentencePiece model, so train one of the same size."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCAB - 7,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        character_coverage=1.0,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()


def randomise(model: nn.Module, seed: int) -> None:
    """Random weights with enough spread that every layer, norm and bias shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)  # norms stay near their one (or gemma's zero), biases near zero
            else:
                parameter.copy_(noise * (0.5 if "embed" in name or "wte" in name else 0.15))
        # GELU's table makes a step of 1e-3 where a last bit differs; small logits keep the tolerance 1e-4.
        for name, parameter in model.named_parameters():
            if model.config.model_type == "gpt2" and "ln_f" in name:
                parameter.mul_(0.01)
            elif model.config.model_type.startswith("gemma") and name == "model.norm.weight":
                parameter.add_(1).mul_(0.05).sub_(1)
            elif model.config.model_type == "gpt_neox" and name in ("embed_out.weight", "lm_head.weight"):
                parameter.mul_(0.1)


def make(arch: str, directory: str | Path, seed: int = 0, **config: Any) -> Path:
    """Write a random float32 model of ``arch`` (a key of the above) with tokenizer; return its directory.

    ``config`` overrides the transformers configuration. Vocabulary VOCAB, width WIDTH, 4 layers (gemma3: 7).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model_type, own = {**TORCH_ONLY, **ARCHITECTURES}[arch]
    torch.manual_seed(seed)
    configuration = AutoConfig.for_model(model_type, **{**_COMMON, **own, **config})
    model = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(directory)
    if model_type == "phi3":
        # llama.cpp looks these up without asking
        tokens = tokenizer(special=("<unk>", "<s>", "</s>", "<|endoftext|>"))
    else:
        tokens = tokenizer(VOCAB if model_type == "gemma3_text" else VOCAB - 7)
    tokens.save_pretrained(directory)
    if model_type == "gemma2":
        _sentencepiece(directory)
    path = directory / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    # phi3's converter tells Phi-4's byte-level vocabulary by this name
    saved["tokenizer_class"] = "GPT2Tokenizer" if model_type == "phi3" else "PreTrainedTokenizerFast"
    path.write_text(json.dumps(saved, indent=2), encoding="utf-8")
    # What older transformers wrote and upstream's converter still reads.
    path = directory / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if model_type == "gpt2":
        saved["n_ctx"] = saved["n_positions"]
    if model_type == "gpt_neox":
        saved["rotary_pct"] = own["rotary_pct"]
    path.write_text(json.dumps(saved, indent=2), encoding="utf-8")
    return directory


def gguf(model_dir: str | Path, out: str | Path, outtype: str = "f32") -> Path:
    """Convert with upstream's converter in this process, to one of upstream's own types. Return ``out``."""
    from first_convert.upstream import convert_hf_to_gguf

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        convert_hf_to_gguf([str(model_dir), "--outfile", str(out), "--outtype", outtype])
    finally:
        logging.disable(level)
    return Path(out)


class _Gelu(nn.Module):
    """GELU as llama.cpp's CPU backend computes it: tanh form, from a table with float16 index and values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))


def multimodal(directory: str | Path) -> Path:
    """A random gemma3 with an image encoder beside its language model, as the larger Gemma 3 come."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    own = {"vision_config": {**vision, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = Gemma3Config(text_config={**_COMMON, **ARCHITECTURES["gemma3"][1]}, **own, **tokens)
    directory = make("gemma3", directory)  # its tokenizer
    model = Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(load(directory).model.state_dict())
    model.tie_weights()
    model.save_pretrained(directory)
    return directory


def load(model: str | Path | nn.Module) -> nn.Module:
    """The model of a directory in float32 with eager attention; a module passes through.

    GELU becomes llama.cpp's: its table differs from the exact function by up to 1e-3.
    """
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if "gelu" in type(child).__name__.lower():
                setattr(module, name, _Gelu())
    return net


def layers(model: nn.Module) -> nn.ModuleList:
    """The list of transformer layers, wherever the architecture (or PEFT) keeps it."""
    n_layer = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layer)


class _Layer(nn.Module):
    """Stands in for a layer: the first ``n_full`` tokens run it, the others pass by; its inputs are kept."""

    def __init__(self, layer: nn.Module, n_full: int | None):
        super().__init__()
        self.layer, self.n_full = layer, n_full
        self.attention_type = getattr(layer, "attention_type", None)
        self.seen: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen = hidden.detach()
        if self.n_full == 0:
            return hidden
        out = self.layer(hidden, *args, **kwargs)
        if self.n_full is None:
            return out
        first = out[0] if isinstance(out, tuple) else out
        mixed = torch.cat([first[:, : self.n_full], hidden[:, self.n_full :]], dim=1)
        return (mixed, *out[1:]) if isinstance(out, tuple) else mixed


def _forward(
    model: nn.Module, mask: Sequence[int], ids: Sequence[int], n_full: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [n, vocab] and each layer's inputs [n, width]; layers off in ``mask`` run ``n_full`` tokens."""
    stack = layers(model)
    originals = list(stack)
    assert len(mask) == len(originals), f"mask has {len(mask)} entries, the model {len(originals)} layers"
    try:
        for i, layer in enumerate(originals):
            stack[i] = _Layer(layer, None if mask[i] else n_full)
        with torch.no_grad():
            out = model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        return out.logits[0].float().numpy(), [layer.seen[0].float().numpy() for layer in stack]
    finally:
        for i, layer in enumerate(originals):
            stack[i] = layer


def gold(
    model: str | Path | nn.Module,
    mask: Sequence[int],
    prompt_ids: Sequence[int],
    next_ids: Sequence[int] = (),
    prefill: str = "full",
) -> np.ndarray:
    """Logits, float32 [len(prompt_ids) + len(next_ids), vocab], of a forward that leaves out layers.

    ``mask[l]`` true keeps layer l. With prefill "skip" the other layers are absent altogether; with
    "full" they run for the prompt, and later tokens neither run them nor leave keys in them.
    There is no cache: all is recomputed at once.
    """
    n_full = len(prompt_ids) if prefill == "full" else 0
    return _forward(load(model), mask, [*prompt_ids, *next_ids], n_full)[0]


def decide(
    model: str | Path | nn.Module, recipe_dir: str | Path, prompt_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(mask bool [n_layer], mean score float32 [n_layer]) of the routers for a prompt."""
    from pyfirst.recipe import load_recipe

    net, recipe = load(model), load_recipe(recipe_dir)
    config = recipe.config

    def score(layer: int, inputs: np.ndarray) -> float:
        x = inputs.astype(np.float64)
        if config.router_norm == "rms":
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        logit = x @ recipe.weight[layer].astype(np.float64) + recipe.bias[layer]
        return float((1 / (1 + np.exp(-logit))).mean())

    n_layer = config.block_count
    mask, scores = np.ones(n_layer, dtype=bool), np.zeros(n_layer, dtype=np.float32)
    if config.prefill == "full":
        inputs = _forward(net, mask, prompt_ids, 0)[1]
        scores[:] = [score(i, inputs[i]) for i in range(n_layer)]
        mask = scores >= config.threshold
        mask[config.protected] = True
        return mask, scores
    for i in range(n_layer):  # the decision for a layer sees what the layers before it left
        scores[i] = score(i, _forward(net, mask, prompt_ids[: config.window], 0)[1][i])
        mask[i] = scores[i] >= config.threshold or i in config.protected
    return mask, scores


def recipe(
    directory: str | Path,
    model_dir: str | Path,
    mask: Sequence[int] | None = None,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a recipe directory for the model; return it.

    ``mask`` forces the decision (zero weights, bias +-10). Otherwise the prompt decides by ``weight``
    [n_layer, width] and ``bias`` [n_layer], random from ``seed`` where absent. ``config``: FirstConfig.
    """
    from pyfirst.recipe import FirstConfig, save_recipe

    directory = Path(directory)
    model_config = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
    n_layer = model_config.get("num_hidden_layers") or model_config["n_layer"]
    width = model_config.get("hidden_size") or model_config["n_embd"]
    generator = np.random.default_rng(seed)
    if mask is not None:
        weight = np.zeros((n_layer, width), dtype=np.float32)
        bias = np.where(np.asarray(mask, dtype=bool), 10.0, -10.0).astype(np.float32)
    if weight is None:
        weight = generator.normal(0, 0.3, (n_layer, width)).astype(np.float32)
    if bias is None:
        bias = generator.normal(0, 0.1, n_layer).astype(np.float32)
    save_recipe(directory, FirstConfig(n_layer, width, **config), weight, bias)
    return directory


def adapter(model_dir: str | Path, out: str | Path, seed: int = 1, spread: float = 0.1, **lora: Any) -> Path:
    """Write a PEFT LoRA for the model, all adapter weights random (B too); return its directory.

    ``lora``: arguments of peft.LoraConfig (default r=4, lora_alpha=8, all linear layers).
    """
    import peft

    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = peft.get_peft_model(load(model_dir), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "lora_" in name:
                    parameter.copy_(spread * noise)
                else:  # a whole module trained beside the pairs
                    parameter.add_(0.05 * noise)
    model.save_pretrained(out)
    return Path(out)


def prompt(length: int = 24, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB - 7, length).tolist()
