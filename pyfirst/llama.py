"""FirstLlama: llama_cpp.Llama whose prompts decide which layers are left out.

The method is FiRST (https://arxiv.org/abs/2410.12513). For layer l with input h_l::

    score_l(t) = sigmoid(w_l . n(h_l(t)) + b_l)                       for every prompt token t
    keep_l     = mean over t of score_l(t) >= threshold
    h_(l+1)    = keep_l ? layer_l(h_l) : h_l                          while decoding
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyfirst import metadata, native
from pyfirst.errors import InputError

import llama_cpp  # isort: skip  (after native, which points it at our library)

logger = logging.getLogger("pyfirst")


@dataclass(frozen=True)
class Routing:
    """What was decided for a prompt.

    Attributes:
        mask: bool [n_layer], True = the layer is kept.
        scores: float32 [n_layer], mean score of each layer over the tokens that decided; None if forced or dense.
        prefill: "full" or "skip".
        threshold: what the scores were compared with, None if forced or dense.
    """

    mask: np.ndarray
    scores: np.ndarray | None
    prefill: str
    threshold: float | None

    def report(self) -> dict[str, Any]:
        """The "first" entry of a result."""
        return {
            "n_layer": len(self.mask),
            "kept": int(self.mask.sum()),
            "skipped": np.flatnonzero(~self.mask).tolist(),
            "prefill": self.prefill,
        }


@dataclass
class _Live:
    """What the sequence in the KV cache went through; decides how much of it the next prompt may reuse."""

    kind: str = "empty"  # or "dense", "routed", "forced"
    prefill: str = "full"
    n_dense: int = 0  # leading tokens whose keys and values exist in all layers
    deciding: tuple[int, ...] = ()  # in "skip": the tokens that decided
    threshold: float | None = None
    mask: tuple[bool, ...] = ()


def usable_cpus() -> int:
    """CPUs that this process may use: affinity and, on Linux, the cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def pick_threshold(
    model: int, model_path: str, keys: dict[str, str], threshold: float | None, skip: float | None
) -> float:
    """The threshold to route with: as given, for a share of layers to skip (0 to 1), or what the file says.

    Raises InputError for values out of range and for a share that the file has no calibration for.
    """
    if threshold is not None and skip is not None:
        raise InputError("threshold and skip exclude each other")
    if skip is not None:
        if not 0 <= skip <= 1:
            raise InputError(f"skip is {skip}, expected a share of layers from 0 to 1")
        thresholds, kept = native.calibration(model)
        if not len(kept):
            raise InputError(f"{model_path}: not calibrated, so skip={skip} cannot be translated; use threshold=")
        order = np.argsort(kept, kind="stable")
        return float(np.interp(1 - skip, kept[order], thresholds[order]))
    if threshold is None:
        return float(keys.get(metadata.ROUTER_THRESHOLD, 0.5))
    if not np.isfinite(threshold):
        raise InputError(f"threshold is {threshold}, expected a finite number")
    return float(threshold)


def common_prefix(a: Iterable[int], b: Iterable[int]) -> int:
    """Number of leading tokens that are equal."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


class FirstLlama(llama_cpp.Llama):
    """llama_cpp.Llama that leaves out the layers which the prompt does not need.

    Completion, chat and streaming return what the parent returns, plus a ``"first"`` entry:
    ``{"n_layer": 30, "kept": 24, "skipped": [..], "prefill": "full"}``. A GGUF without routers runs dense.

    Keys and values are reused between calls only where a fresh object would have computed the same: in "full" the
    common part of both prompts, in "skip" the common prefix if the same tokens decide.

    Args:
        model_path: GGUF file.
        routing: let the routers decide; False runs dense, exactly as the parent does.
        threshold: a layer is kept when its mean score reaches it; default: what the file says.
        skip: share of layers to skip on average, from 0 to 1, instead of a threshold; needs a calibrated file.
        prefill: "full" (the prompt runs all layers) or "skip" (the prompt skips too); default: what the file says.
        mask: bool [n_layer], True = keep, forces the decision; also for files without routers.
        skip_layers: layer indices to skip, the other way to say ``mask``.
        sticky: keep the first decision for a chat that only grows.
        **kwargs: arguments of llama_cpp.Llama; ``n_threads`` defaults to the CPUs this process may use.

    Raises:
        ValueError: no such file, not a usable GGUF, mask of the wrong length, prefill or threshold out of range,
            an architecture whose layers cannot be skipped.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        routing: bool = True,
        threshold: float | None = None,
        skip: float | None = None,
        prefill: str | None = None,
        mask: Sequence[bool] | np.ndarray | None = None,
        skip_layers: Sequence[int] | None = None,
        sticky: bool = False,
        **kwargs: Any,
    ):
        if prefill not in (None, *metadata.PREFILL_MODES):
            raise InputError(f"prefill is {prefill!r}, expected one of {', '.join(metadata.PREFILL_MODES)}")
        kwargs.setdefault("verbose", False)
        # The parent's default seed gives every process the same first answer.
        kwargs.setdefault("seed", random.SystemRandom().getrandbits(31))
        for key in ("n_threads", "n_threads_batch"):
            kwargs[key] = kwargs.get(key) or usable_cpus()
        self._open_model(os.fspath(model_path), kwargs)

        self.n_layer: int = llama_cpp.llama_model_n_layer(self.model)
        self.has_routers = native.routed_layers(self.model) > 0
        self.prefill: str = prefill or self.metadata.get(metadata.PREFILL, "full")
        self.window = int(self.metadata.get(metadata.WINDOW, 512))
        # llama.cpp rounds a small context up; the parent's buffers do not follow.
        self._n_cells = min(self.n_ctx(), len(self.input_ids))
        wanted = min(self.window, self._n_cells)
        if self.prefill == "skip" and self.context_params.n_ubatch < wanted:
            # The tokens that decide must be in one micro-batch, or the mask would depend on its size.
            self.close()
            kwargs["n_batch"] = max(wanted, kwargs.get("n_batch", 512))
            kwargs["n_ubatch"] = wanted
            self._open_model(os.fspath(model_path), kwargs)

        self.routing: Routing | None = None
        self.sticky = sticky
        self._forced = self._check_mask(mask, skip_layers)
        self._call_mask: np.ndarray | None = None
        self._live = _Live()
        self._pending: _Live | None = None
        self._full = False  # the last answer filled the context
        self._threshold: float | None = None
        self._routed = False
        if routing and not self.has_routers:
            if self._forced is None:
                logger.warning("%s: no routers in this file, running dense", model_path)
        elif routing:
            self.threshold = pick_threshold(self.model, os.fspath(model_path), self.metadata, threshold, skip)
            native.set_routing(self.ctx, True)
            self._routed = True
        mode = native.set_prefill(self.ctx, metadata.PREFILL_MODES.index(self.prefill))
        self.prefill = metadata.PREFILL_MODES[mode]

    def _open_model(self, model_path: str, kwargs: dict[str, Any]) -> None:
        with native.explained(model_path):
            super().__init__(model_path, **kwargs)

    def _check_mask(
        self, mask: Sequence[bool] | np.ndarray | None, skip_layers: Sequence[int] | None
    ) -> np.ndarray | None:
        """The forced mask, bool [n_layer], or None. Raises InputError."""
        if mask is None and skip_layers is None:
            return None
        if mask is not None and skip_layers is not None:
            raise InputError("mask and skip_layers exclude each other")
        if skip_layers is not None:
            result = np.ones(self.n_layer, bool)
            for layer in skip_layers:
                if not 0 <= layer < self.n_layer:
                    raise InputError(f"skip_layers names layer {layer}, the model has layers 0 to {self.n_layer - 1}")
                result[layer] = False
            return result
        result = np.asarray(mask)
        if result.shape != (self.n_layer,):
            raise InputError(f"mask has shape {list(result.shape)}, the model has {self.n_layer} layers")
        return result.astype(bool)

    @property
    def threshold(self) -> float | None:
        """A layer is kept when its mean score reaches this; None where nothing is routed. May be set between calls."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        native.set_threshold(self.ctx, value)
        self._threshold = float(value)

    @contextlib.contextmanager
    def forcing(self, mask: Sequence[bool] | np.ndarray | None) -> Iterator[None]:
        """Force ``mask``, bool [n_layer], on all prompts inside the with block; None lets the routers decide."""
        before, self._forced = self._forced, self._check_mask(mask, None)
        try:
            yield
        finally:
            self._forced = before

    def _active_mask(self) -> np.ndarray | None:
        """The mask to force on the next prompt, or None where the routers decide or nothing is skipped at all."""
        return self._call_mask if self._call_mask is not None else self._forced

    def _reusable(self, tokens: list[int], forced: np.ndarray | None) -> tuple[int, bool]:
        """(leading tokens of the KV cache to keep, whether the pinned mask goes on).

        At least one token is computed again, for its logits.
        """
        live = self._live
        prefix = min(common_prefix(self.input_ids[: self.n_tokens].tolist(), tokens), len(tokens) - 1)
        if forced is None and not self._routed:
            return (prefix, False) if live.kind in ("empty", "dense") else (min(prefix, live.n_dense), False)
        if forced is not None:
            same = live.kind == "forced" and live.mask == tuple(forced.tolist()) and live.prefill == self.prefill
            if self.prefill == "skip":
                return (prefix, True) if same else (0, False)
            return min(prefix, live.n_dense), False
        if live.kind != "routed" or live.prefill != self.prefill:
            return 0, False
        if self.sticky and prefix >= max(live.n_dense, len(live.deciding)):
            return prefix, True
        if self.prefill == "full":
            return min(prefix, live.n_dense), False
        same = live.deciding == tuple(tokens[: self.window]) and live.threshold == self.threshold
        return (prefix, True) if same else (0, False)

    def _open(self, tokens: list[int]) -> list[int]:
        """Make the sequence ready for a prompt; return the tokens that are still to be computed."""
        forced = self._active_mask()
        keep, pinned = self._reusable(tokens, forced)
        if keep == 0 or not self._ctx.kv_cache_seq_rm(0, keep, -1):
            keep, pinned = 0, False
            self._ctx.kv_cache_seq_rm(0, -1, -1)
        self.n_tokens = keep
        self._requires_eval = True
        self._pending = None
        if pinned:
            return tokens[keep:]
        if forced is not None:
            self._pending = _Live("forced", self.prefill, mask=tuple(forced.tolist()))
            native.set_mask(self.ctx, forced if self.prefill == "skip" else None)
            if self.prefill == "full" and self._routed:
                # Without a mask of its own an empty sequence would be routed.
                native.set_mask(self.ctx, np.ones(self.n_layer, bool))
        elif self._routed:
            deciding = tuple(tokens[: self.window]) if self.prefill == "skip" else ()
            self._pending = _Live("routed", self.prefill, deciding=deciding, threshold=self.threshold)
            native.begin(self.ctx)
        else:
            self._pending = _Live("dense")
            if keep:
                native.set_mask(self.ctx, None)
        return tokens[keep:]

    def _close(self, opened: _Live) -> None:
        """The prompt has been read: pin the mask and report it."""
        mask, scores, threshold = np.ones(self.n_layer, bool), None, None
        if opened.kind == "forced":
            mask = np.array(opened.mask)
            if opened.prefill == "full":
                native.set_mask(self.ctx, mask)
        elif opened.kind == "routed":
            native.commit(self.ctx)
            pinned = native.get_mask(self.ctx, self.n_layer)
            assert pinned is not None
            mask, scores, threshold = pinned, native.get_scores(self.ctx, self.n_layer), opened.threshold
        opened.n_dense = self.n_tokens if opened.prefill == "full" else 0
        opened.mask = tuple(mask.tolist())
        self._live = opened
        self.routing = Routing(mask, scores, opened.prefill, threshold)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens, as the parent does. The first ones after reset() are the prompt that decides."""
        if self.n_tokens == 0 and self._pending is None:
            tokens = self._open(list(tokens))
        super().eval(tokens)
        if self._pending is not None:
            opened, self._pending = self._pending, None
            self._close(opened)

    def generate(
        self, tokens: Sequence[int], *args: Any, reset: bool = True, **kwargs: Any
    ) -> Generator[int, Any, None]:
        """Yield tokens, as the parent does. Raises ValueError for an empty prompt and one that exceeds n_ctx."""
        tokens = list(tokens)
        if not tokens and reset:
            raise InputError("the prompt is empty: at least one token must decide")
        if len(tokens) > self._n_cells:
            raise InputError(f"the prompt has {len(tokens)} tokens, the context holds {self._n_cells}")
        if reset:
            tokens = self._open(tokens)
        kwargs["reset"] = False
        parent = super().generate(tokens, *args, **kwargs)
        received = None
        self._full = False
        while True:
            try:
                token = parent.send(received)
            except StopIteration:
                return
            received = yield token
            if self.n_tokens >= self._n_cells:
                # The parent would run into the end of the context in the middle of a character.
                self._full = True
                yield self.token_eos()
                return

    def _complete(self, result: Any) -> Any:
        """Add the "first" entry, and say "length" where the end of the context ended the text."""
        if self.routing is not None:
            result["first"] = self.routing.report()
        for choice in result["choices"]:
            if self._full and choice["finish_reason"] == "stop":
                choice["finish_reason"] = "length"
        return result

    def _answer(self, call: Any, stream: bool, mask: np.ndarray | None) -> Any:
        """Run one request with its own forced mask and add the "first" entry to what comes back."""
        if stream:
            return self._stream(call, mask)
        self._call_mask = mask
        try:
            return self._complete(call())
        finally:
            self._call_mask = None

    def _stream(self, call: Any, mask: np.ndarray | None) -> Iterator[Any]:
        self._call_mask = mask
        try:
            for chunk in call():
                self._call_mask = None
                yield self._complete(chunk)
        finally:
            self._call_mask = None

    def create_completion(self, prompt: str | list[int], *args: Any, **kwargs: Any) -> Any:
        """The parent's completion with a "first" entry.

        ``mask`` or ``skip_layers`` forces this call's decision. Raises ValueError for an empty prompt, one that
        exceeds n_ctx, and a mask of the wrong length.
        """
        if len(prompt) == 0:
            raise InputError("the prompt is empty: at least one token must decide")
        mask = self._check_mask(kwargs.pop("mask", None), kwargs.pop("skip_layers", None))
        if mask is None:
            mask = self._call_mask  # a chat handler calls us in the middle of create_chat_completion
        return self._answer(
            lambda: super(FirstLlama, self).create_completion(prompt, *args, **kwargs),
            kwargs.get("stream", False),
            mask,
        )

    def __call__(self, prompt: str, *args: Any, **kwargs: Any) -> Any:
        """Same as create_completion."""
        return self.create_completion(prompt, *args, **kwargs)

    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """The parent's chat completion with a "first" entry; ``mask`` and ``skip_layers`` as in create_completion."""
        if not messages:
            raise InputError("messages is empty: at least one message must decide")
        mask = self._check_mask(kwargs.pop("mask", None), kwargs.pop("skip_layers", None))
        return self._answer(
            lambda: super(FirstLlama, self).create_chat_completion(messages, *args, **kwargs),
            kwargs.get("stream", False),
            mask,
        )

    def reset(self) -> None:
        """Forget the sequence and its mask."""
        super().reset()
        self._pending = None

    def save_state(self) -> Any:
        """The parent's state; keys, values and mask are inside."""
        state = super().save_state()
        state.first = (self._live, self.routing)  # type: ignore[attr-defined]  # rides along when pickled
        return state

    def load_state(self, state: Any) -> None:
        """Restore keys, values and mask. Raises RuntimeError or ValueError if the state does not fit."""
        if not hasattr(state, "first"):
            raise InputError("the state was saved without layer masks, by a plain llama_cpp.Llama")
        self._pending = None
        try:
            super().load_state(state)
        except RuntimeError:
            # Half a state may have been read: begin afresh.
            self.reset()
            self._ctx.kv_cache_clear()
            self._live = _Live()
            raise
        self._live, self.routing = state.first

    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """(threshold, mean share of layers kept), float32 [n] each, as measured after training; empty if unknown."""
        return native.calibration(self.model)
