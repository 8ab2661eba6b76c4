"""FiRST routers around the decoder layers of any ``AutoModelForCausalLM``.

The method is that of FiRST (https://arxiv.org/abs/2410.12513). Its authors published no code, so this is the
form used here, in training, in the file format and in the llama.cpp runtime alike. With h_l(t) in R^D the
input of layer l at token t (the residual stream):

    score_l(t) = sigmoid(w_l . n(h_l(t)) + b_l)
    keep_l     = mean over the deciding prompt tokens of score_l(t) >= threshold
    h_(l+1)    = layer_l(h_l) if keep_l else h_l

n is the identity ("none") or RMS normalisation without gain ("rms"): n(x) = x * rsqrt(mean(x^2) + 1e-6).
All of it is float32, whatever the model's dtype. Protected layers are always kept.

- prefill "full": the prompt runs every layer and all of its tokens decide; skipping starts with the first
  response token.
- prefill "skip": layer l is decided on the hidden states that reached it, the prompt itself skips, and its
  first ``window`` tokens decide.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from pyfirst.errors import InputError
from pyfirst.recipe import Recipe

RMS_EPS = 1e-6
NO_LAYER = "every layer was skipped; lower the threshold or protect a layer"
# Layers that carry a state from token to token, as a model's config names them.
RECURRENT = {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "recurrent"}


class Routers(nn.Module):
    """One linear unit per layer: ``weight`` float32 [L, D] and ``bias`` float32 [L], both start at zero."""

    def __init__(self, block_count: int, embedding_length: int, norm: str = "rms") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(block_count, embedding_length, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(block_count, dtype=torch.float32))
        self.norm = norm

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Routers:
        """The routers that a recipe holds."""
        config = recipe.config
        routers = cls(config.block_count, config.embedding_length, config.router_norm)
        with torch.no_grad():
            routers.weight.copy_(torch.from_numpy(recipe.weight))
            routers.bias.copy_(torch.from_numpy(recipe.bias))
        return routers

    def normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """n(h) in float32, shape as ``hidden``."""
        hidden = hidden.float()
        if self.norm == "rms":
            hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + RMS_EPS)
        return hidden

    def token_scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """score_l(t): float32 [B, T] in (0, 1) for ``hidden`` [B, T, D] of any float dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.sigmoid(self.normalise(hidden) @ self.weight[layer] + self.bias[layer])


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean [B] of ``values`` [B, T] where ``mask`` [B, T] is true; other values never count, not even NaN."""
    return values.masked_fill(~mask, 0).sum(1) / mask.sum(1)


def per_example(output: dict[str, Any], count: int) -> torch.Tensor:
    """Mean cross-entropy float32 [count] of each row of a FirstModel output; 0 where no token counts."""
    loss, rows = output["token_loss"], output["rows"]
    total = torch.zeros(count, device=loss.device).index_add(0, rows, loss)
    return total / torch.bincount(rows, minlength=count).clamp(min=1)


def find_layers(model: Any) -> nn.ModuleList:
    """The decoder layers: the outermost ModuleList whose length the config names. Raises InputError."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if count is None:
        raise InputError(f"{type(model).__name__}: its config does not say num_hidden_layers, how many layers it has")
    found = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # A mixture of experts may hold as many experts as layers, but deeper inside.
    outermost = [item for item in found if item[0] == min(depth for depth, _, _ in found)]
    if len(outermost) != 1:
        names = ", ".join(name for _, name, _ in outermost) or "none"
        kind = type(model).__name__
        raise InputError(f"{kind}: expected one list of {count} decoder layers, found {names}")
    return outermost[0][2]


def check_layers(model: Any) -> None:
    """Raise InputError where layers are not found, or need one another, so that none can be left out."""
    who, text = type(model).__name__, model.config.get_text_config()
    kinds = {kind for key in ("layer_types", "layers_block_type") for kind in getattr(text, key, None) or ()}
    if kinds & RECURRENT or model._is_stateful:
        kind = min(kinds & RECURRENT, default="recurrent")
        raise InputError(f"{who}: has {kind} layers, whose state needs every token; none can be skipped")
    modes = [mode for key in ("kv_sharing_modes", "indexer_types") for mode in getattr(text, key, None) or ()]
    if {"reuse", "shared"} & set(modes):
        raise InputError(f"{who}: has layers that reuse what others found (keys, values, indices); none can be skipped")
    if not {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters):
        raise InputError(f"{who}: takes no cache of keys and values, without which layers cannot be skipped")
    find_layers(model)


class RoutedCache(DynamicCache):
    """A DynamicCache whose length does not come from layer 0, which may have been skipped.

    The length is that of the longest layer of the same kind (full or sliding attention): a layer that a
    sequence keeps has seen every token, one that it skips is never read again. The layers before the one that is
    asked for do not count: when it asks itself, in mid-forward, they hold the new tokens already.
    """

    def _length(self, layer_idx: int) -> int:
        get: Any = getattr(self.layers[layer_idx], "get_seq_length", None)  # recurrent states have no length
        return get() if get else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(map(self._length, range(layer_idx, len(self.layers))), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        kinds = [type(layer) for layer in self.layers]
        same = [i for i in range(layer_idx, len(kinds)) if kinds[i] is kinds[layer_idx]]
        return super().get_mask_sizes(query_length, max(same, key=self._length, default=layer_idx))


@dataclass
class Pass:
    """How one forward call routes, and what it decided.

    Attributes:
        deciding: bool [B, T], tokens whose scores decide; None when ``keep`` is given.
        routed: bool [B, T], tokens that a skipped layer passes over; None for all.
        keep: bool [B, L], the mask of each sequence.
        soft: gate every routed token with its own score instead of the mask (the paper's phase 1).
        straight_through: let the loss reach the routers through the hard mask.
        scores: per layer, mean score float32 [B].
    """

    deciding: torch.Tensor | None
    routed: torch.Tensor | None
    keep: torch.Tensor
    soft: bool = False
    straight_through: bool = False
    scores: list[torch.Tensor] = field(default_factory=list)


class FirstModel(nn.Module):
    """A causal LM with a router before each decoder layer.

    The layers stay where they are: only their ``forward`` is replaced, so parameter names, PEFT and
    ``save_pretrained`` see the model they know. ``unwrap()`` undoes it.

    Args:
        base: any AutoModelForCausalLM, or a PeftModel of one.
        routers: what decides; its L and D must be the model's.
        threshold: a layer is kept when its mean score reaches it.
        prefill: "full" or "skip".
        window: in "skip", at most this many first prompt tokens decide.
        protected: layers that are always kept.

    Raises InputError when the routers do not fit the model, or its layers cannot be left out.
    """

    threshold: torch.Tensor
    protected: torch.Tensor
    base: Any

    def __init__(
        self,
        base: Any,
        routers: Routers,
        threshold: float = 0.5,
        prefill: str = "full",
        window: int = 512,
        protected: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.base = base
        self.routers = routers
        # A buffer, so that checkpoints and other processes see the steered value.
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))
        self.prefill = prefill
        self.window = window
        self.gate = "hard"
        inner = self.inner
        check_layers(inner)
        layers = find_layers(inner)
        width = inner.config.get_text_config().hidden_size
        if routers.weight.shape != (len(layers), width):
            raise InputError(
                f"routers for {routers.weight.shape[0]} layers of width {routers.weight.shape[1]} do not fit "
                f"the model, which has {len(layers)} layers of width {width}"
            )
        bad = [i for i in protected if not 0 <= i < len(layers)]
        if bad:
            raise InputError(f"protected layer {bad[0]} does not exist, layers are 0 to {len(layers) - 1}")
        self.register_buffer(
            "protected", torch.tensor([i in set(protected) for i in range(len(layers))]), persistent=False
        )
        self.layers = list(layers)
        self._outputs: list[int | None] = [None] * len(layers)
        self._pass: Pass | None = None
        self._parameters_of_forward = set(inspect.signature(inner.forward).parameters)
        self.wrap()
        for module in self.modules():
            if hasattr(module, "cast_input_dtype_enabled"):  # PEFT would copy every input to float32
                module.cast_input_dtype_enabled = inner.dtype != torch.bfloat16
        self._probe()

    @property
    def inner(self) -> Any:
        """The transformers model, without PEFT around it."""
        return self.base.get_base_model() if hasattr(self.base, "get_base_model") else self.base

    @property
    def block_count(self) -> int:
        """L, the number of decoder layers."""
        return len(self.layers)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Routers, threshold and LoRA only: what a checkpoint needs beside the base model."""
        state = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if not k.startswith("base.") or "lora_" in k}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` gave. Raises RuntimeError if one of its tensors is missing or unknown."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in self.state_dict() if key not in state_dict]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"checkpoint does not fit: {[*missing, *result.unexpected_keys][0]}")
        result.missing_keys.clear()  # the base model's own
        return result

    def lora(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by name."""
        return {name: parameter for name, parameter in self.named_parameters() if "lora_" in name}

    @contextlib.contextmanager
    def with_lora(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside the block, which must not need gradients, the LoRA has other weights: names as in ``lora()``."""
        mine = self.lora()
        own = {name: parameter.data for name, parameter in mine.items()}
        try:
            for name, parameter in mine.items():
                parameter.data = weights[name]
            with torch.no_grad():
                yield
        finally:
            for name, parameter in mine.items():
                parameter.data = own[name]

    def _precision(self) -> Any:
        """Autocast for a bfloat16 model: its float32 LoRA then computes in bfloat16 too, without copies."""
        dtype = self.inner.dtype
        device = self.routers.weight.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def wrap(self) -> None:
        """Put the routers before the layers; done on construction."""
        for index, layer in enumerate(self.layers):
            layer.forward = self._routed_forward(index, layer.forward)

    def unwrap(self) -> None:
        """Give the layers their own ``forward`` back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    @torch.no_grad()
    def _probe(self) -> None:
        """Learn from one token what each layer returns, a tensor or a tuple, as a skipped one must too.

        Raises InputError where the layers do not read one stream, once each.
        """
        shapes: list[list[int]] = []
        token = torch.zeros(1, 1, dtype=torch.long, device=next(self.inner.parameters()).device)
        with self._precision(), self._inputs(lambda hidden: shapes.append(list(hidden.shape))):
            self.inner(input_ids=token, use_cache=False)
        who, wanted = type(self.inner).__name__, [1, 1, self.routers.weight.shape[1]]
        for shape in shapes:
            if shape != wanted:
                raise InputError(f"{who}: its layers read {shape} for a token; routers can read one stream, {wanted}")
        if len(shapes) != self.block_count:
            raise InputError(f"{who}: runs its {self.block_count} layers {len(shapes)} times, expected once each")

    def _routed_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            route = self._pass
            gate = None if route is None else self._decide(index, hidden, route)
            if route is None or gate is None:
                output = original(*args, **kwargs)
                self._outputs[index] = len(output) if isinstance(output, tuple) else None
                return output
            keep, score = gate
            length = self._outputs[index]
            if keep is None:
                return hidden if length is None else (hidden, *[None] * (length - 1))
            output = original(*args, **kwargs)
            new = output[0] if isinstance(output, tuple) else output
            if route.soft:
                mixed = hidden + keep.to(hidden.dtype) * (new - hidden)
            else:
                # A choice, not a blend: a value that is not finite in a skipped layer must not come through.
                mixed = torch.where(keep, new, hidden)
                if score is not None:
                    routed = torch.ones_like(keep) if route.routed is None else route.routed[..., None]
                    zero = (score - score.detach())[:, None, None]
                    mixed = mixed + (routed * zero).to(hidden.dtype) * (new - hidden).detach()
            return mixed if not isinstance(output, tuple) else (mixed, *output[1:])

        return forward

    def _decide(
        self, index: int, hidden: torch.Tensor, route: Pass
    ) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
        """What happens to layer ``index``: None to run it plainly, else (gate, score).

        The gate is bool [B, T, 1] (float32 token scores when soft), or None to leave the layer out; the score
        is given only where its gradient is wanted.
        """
        score = None
        times = hidden.shape[0] // route.keep.shape[0]
        if times > 1:  # beams, or several answers to a prompt
            route.keep = route.keep.repeat_interleave(times, 0)
            if route.deciding is not None:
                route.deciding = route.deciding.repeat_interleave(times, 0)
            if route.routed is not None:
                route.routed = route.routed.repeat_interleave(times, 0)
        if route.deciding is not None:
            tokens = self.routers.token_scores(index, hidden)
            score = masked_mean(tokens, route.deciding)
            route.scores.append(score)
            if self.protected[index]:
                return None
            if route.soft:
                gate = tokens[..., None]
                if route.routed is not None:
                    gate = torch.where(route.routed[..., None], gate, 1.0)
                return gate, score
            route.keep[:, index] = score.detach() >= self.threshold
        keep = route.keep[:, index].clone()  # the column next to it is still to be written
        if route.routed is None:
            if bool(keep.all()) and not route.straight_through:
                return None
            if not bool(keep.any()) and not route.straight_through:
                return None, None
            gate = keep[:, None, None].expand(*hidden.shape[:2], 1)
        else:
            gate = (keep[:, None] | ~route.routed)[..., None]
        return gate, (score if route.straight_through else None)

    def deciding(self, prompt: torch.Tensor) -> torch.Tensor:
        """The tokens whose scores decide, bool [B, T], of those that are prompt."""
        return prompt if self.prefill == "full" else prompt & (prompt.cumsum(1) <= self.window)

    @contextlib.contextmanager
    def _logits_at(self, places: torch.Tensor | None) -> Iterator[None]:
        """Inside the block logits are [1, N, V], only of the N tokens that ``places``, bool [B, T], is true for."""
        if places is None:
            yield
            return
        # Logits of a prompt are never needed, and a large vocabulary costs more than a layer.
        head = self.inner.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][places][None], *args[1:]))
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def _inputs(self, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Inside the block ``take`` gets h_l, [B, T, D], whenever a layer is called."""

        def hook(_: Any, args: Any, kwargs: Any) -> None:
            take(args[0] if args else kwargs["hidden_states"])

        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    @contextlib.contextmanager
    def features(self, tokens: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Collect from the forward pass inside the block the mean of n(h_l) over ``tokens``, bool [B, T].

        Yields a list that gets a float32 [B, D] for each layer in turn.
        """
        means: list[torch.Tensor] = []
        with self._inputs(lambda h: means.append(masked_mean(self.routers.normalise(h), tokens[..., None]))):
            yield means

    def _start(self, prompt: torch.Tensor, keep: torch.Tensor | None) -> Pass:
        """A pass over ``prompt``, bool [B, T] and true on prompt tokens; ``keep`` forces the masks."""
        if not bool(prompt.any(1).all()):
            row = int((~prompt.any(1)).nonzero()[0])
            raise InputError(f"row {row} of the batch has no prompt token, only padding")
        deciding = self.deciding(prompt)
        routed = ~prompt if self.prefill == "full" else None
        shape = (prompt.shape[0], self.block_count)
        if keep is None:
            return Pass(deciding, routed, torch.ones(shape, dtype=torch.bool, device=prompt.device))
        keep = torch.as_tensor(keep, dtype=torch.bool, device=prompt.device)
        if keep.shape[-1:] != shape[-1:] or keep.dim() not in (1, 2):
            raise InputError(f"a mask of shape {list(keep.shape)} does not fit {self.block_count} layers")
        keep = keep.expand(shape)
        if not bool(keep.any(1).all()):
            raise InputError("a mask that skips every layer leaves no model; keep at least one layer")
        return Pass(None, routed, keep)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        dense: bool = False,
        weight: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Teacher-forced pass.

        Args:
            input_ids: int64 [B, T], padded on either side.
            attention_mask: [B, T], 0 on padding.
            prompt_mask: [B, T], 1 on prompt tokens.
            labels: int64 [B, T], token ids where the loss counts and -100 elsewhere.
            keep: bool [L] or [B, L] to force masks instead of deciding.
            dense: run every layer for every token.
            weight: float32 [B] of the examples in ``loss``, 1 if not given.

        Returns a dict: ``loss`` (mean over the B examples of weight times mean cross-entropy per response token,
        nats), ``token_loss`` float32 [N], ``token_logits`` [N, V] and ``rows`` int64 [N] for the N response tokens
        when labels are given;
        ``logits`` [B, T, V] otherwise; ``keep`` bool [B, L] and ``scores`` float32 [B, L] (empty when forced
        or dense).
        """
        attention_mask, prompt = attention_mask.long(), prompt_mask.bool()
        route = self._start(prompt, keep)
        route.soft = self.gate == "soft"
        trained = torch.is_grad_enabled() and self.routers.weight.requires_grad
        route.straight_through = trained and not route.soft and keep is None
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["use_cache"] = False
        if "position_ids" in self._parameters_of_forward:
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        wanted = None
        if labels is not None:
            wanted = nn.functional.pad(labels[:, 1:] != -100, (0, 1))  # where the next token counts
        self._pass = None if dense else route
        try:
            with self._precision(), self._logits_at(wanted):
                logits = self.base(**inputs).logits
        finally:
            self._pass = None
        result: dict[str, Any] = {
            "keep": torch.ones_like(route.keep) if dense else route.keep,
            "scores": torch.stack(route.scores, 1) if route.scores else torch.empty(0),
        }
        if labels is None or wanted is None:
            return {**result, "logits": logits}
        targets = labels[wanted.roll(1, 1)]
        token_loss = nn.functional.cross_entropy(logits[0].float(), targets, reduction="none")
        if torch.is_grad_enabled() and not token_loss.requires_grad and any(p.requires_grad for p in self.parameters()):
            raise InputError(NO_LAYER)
        result.update({"token_loss": token_loss, "token_logits": logits[0], "rows": wanted.nonzero()[:, 0]})
        each = per_example(result, len(labels))
        return {**result, "loss": (each if weight is None else each * weight).mean()}

    @torch.no_grad()
    def decide(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks bool [B, L] and mean scores float32 [B, L] of prompts [B, T] padded on either side."""
        out = self.forward(input_ids, attention_mask, attention_mask)
        return out["keep"], out["scores"]

    def after_prompt(self, examples: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Run prompts through every layer once, to try masks on their responses (prefill "full").

        Args:
            examples: objects with ``prompt`` and ``response``, lists of token ids.

        Returns a function from a mask bool [L] to the mean cross-entropy float32 [B] of each response.
        """
        device = self.routers.weight.device
        before = max(len(e.prompt) for e in examples)
        behind = max(len(e.response) for e in examples)
        ids = torch.zeros(len(examples), before + behind, dtype=torch.long, device=device)
        mask, asked = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, example in enumerate(examples):
            start, end = before - len(example.prompt), before + len(example.response)
            ids[row, start:end] = torch.tensor(example.prompt + example.response, device=device)
            mask[row, start:end] = 1
            asked[row, before - 1 : end - 1] = True  # where the next token counts
        places, following = (mask.cumsum(1) - 1).clamp(min=0), ids.roll(-1, 1)
        name = "cache" if "cache" in self._parameters_of_forward else "past_key_values"

        @torch.no_grad()
        def step(part: slice, cache: RoutedCache) -> dict[str, torch.Tensor]:
            inputs: dict[str, Any] = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop]}
            if "position_ids" in self._parameters_of_forward:
                inputs["position_ids"] = places[:, part]
            wanted = asked[:, part]
            with self._precision(), self._logits_at(wanted):
                logits = self.base(**inputs, **{name: cache}, use_cache=True).logits[0].float()
            each = nn.functional.cross_entropy(logits, following[:, part][wanted], reduction="none")
            return {"token_loss": each, "rows": wanted.nonzero()[:, 0]}

        prompt_cache = RoutedCache(config=self.inner.config)
        first = step(slice(0, before), prompt_cache)

        def loss(keep: torch.Tensor) -> torch.Tensor:
            self._pass = Pass(None, None, keep.expand(len(ids), -1))
            try:
                rest = step(slice(before, before + behind), copy.deepcopy(prompt_cache))
            finally:
                self._pass = None
            return per_example({key: torch.cat([first[key], rest[key]]) for key in first}, len(ids))

        return loss

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' ``generate`` with skipped layers left out, their keys and values never computed.

        Args:
            input_ids: prompts int64 [B, T], padded on the left where lengths differ.
            attention_mask: [B, T], 0 on padding; all ones when omitted.
            keep: bool [L] or [B, L] to force masks.
            kwargs: passed on to ``generate``; the cache is always on and our own.

        Returns the token ids, prompts included, and the masks bool [B, L] that were used; with n beams or answers
        to a prompt [n * B, L], each row n times.
        Rows of a batch that skip the same layer save its work; a layer that some row keeps is computed once.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prompt = attention_mask.bool()
        route = self._start(prompt, keep)
        if route.routed is not None:
            route.routed = torch.zeros_like(prompt)

        def decided(*_: Any) -> None:
            if not bool(route.keep.any(1).all()):
                raise InputError(NO_LAYER)
            self._pass = Pass(None, None, route.keep)

        name = "cache" if "cache" in self._parameters_of_forward else "past_key_values"
        kwargs.update({"use_cache": True, name: RoutedCache(config=self.inner.config)})
        # A model's own generation config may ask for another cache, or for a prompt in pieces.
        kwargs.update({"cache_implementation": None, "prefill_chunk_size": None})
        hook = self.inner.register_forward_hook(decided)
        self._pass = route
        try:
            with self._precision():
                tokens = self.base.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            self._pass = None
            hook.remove()
        return tokens, route.keep
