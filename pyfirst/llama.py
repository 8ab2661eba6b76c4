"""FirstLlama: llama_cpp.Llama whose prompts decide which layers are left out.

The method is FiRST (https://arxiv.org/abs/2410.12513). For layer l with input h_l::

    score_l(t) = sigmoid(w_l . n(h_l(t)) + b_l)                       for every prompt token t
    keep_l     = mean over t of score_l(t) >= threshold
    h_(l+1)    = keep_l ? layer_l(h_l) : h_l                          while decoding
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import logging
import os
import random
import reprlib
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfirst import completion, fit, metadata, native
from pyfirst.chat import ChatTemplate
from pyfirst.cpu import usable_cpus
from pyfirst.errors import InputError, check_file

import jinja2  # isort: skip  a dependency of llama-cpp-python
import llama_cpp  # isort: skip  (after native, which points it at our library)
from llama_cpp.llama_chat_format import chat_formatter_to_chat_completion_handler  # isort: skip

STATE_VERSION = 1
_FORMER = {"f16_kv", "n_parts"}  # options of llama_cpp.Llama before, which LangChain always passes
_TEMPLATE = "chat_template.default"  # the parent's name for the template in the file

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

    kind: str = "empty"  # or "dense", "routed", "forced", "unscored": without logits that this object must have
    prefill: str = "full"
    n_dense: int = 0  # leading tokens whose keys and values exist in all layers
    deciding: tuple[int, ...] = ()  # in "skip": the tokens that decided
    threshold: float | None = None
    mask: tuple[bool, ...] = ()


def fingerprint(model_path: str) -> str:
    """Tells model files apart, by size, head and tail."""
    with open(model_path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(f"{size}\n".encode())
        for place in (0, max(0, size - 65536)):
            file.seek(place)
            digest.update(file.read(65536))
    return digest.hexdigest()


def finite(name: str, value: Any) -> float:
    """A finite number. Raises InputError."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or not np.isfinite(value):
        raise InputError(f"{name} is {value!r}, expected a finite number")
    return float(value)


@functools.lru_cache(256)  # once, however many requests ask
def _warn(text: str) -> None:
    logger.warning("%s", text)


def as_mask(mask: Any, n_layer: int) -> np.ndarray:
    """True or False (1 or 0) for each layer as bool [n_layer]. Raises InputError."""
    result = np.asarray(mask)
    if result.shape != (n_layer,):
        raise InputError(f"mask has shape {list(result.shape)}, the model has {n_layer} layers")
    if not all(keep in (0, 1) for keep in result.tolist()):
        raise InputError(f"mask is {reprlib.repr(mask)}, expected True or False for each layer")
    return result.astype(bool)


def pick_threshold(
    model: int, model_path: str, keys: dict[str, str], threshold: float | None, skip: float | None
) -> float:
    """The threshold to route with: as given, for a share of layers to skip (0 to 1), or what the file says.

    Raises InputError for values out of range and for a share that the file has no calibration for.
    """
    if threshold is not None and skip is not None:
        raise InputError("threshold and skip exclude each other")
    if skip is not None:
        if not 0 <= finite("skip", skip) <= 1:
            raise InputError(f"skip is {skip}, expected a share of layers from 0 to 1")
        thresholds, kept = native.calibration(model)
        if not len(kept):
            raise InputError(f"{model_path}: not calibrated, so skip={skip} cannot be translated; use threshold=")
        # Scores are above 0, so that a threshold of 0 keeps all, of which no measured point need be sure.
        thresholds, kept = np.append(thresholds, 0.0), np.append(kept, 1.0)
        order = np.argsort(kept, kind="stable")
        nearest = 1 - float(kept[np.abs(kept - (1 - skip)).argmin()])
        if abs(nearest - skip) > 0.07:  # half of the widest step between measured points, an eighth of the layers
            _warn(f"{model_path}: skip={skip:g} cannot be reached, the nearest share of layers is {nearest:.2f}")
        return float(np.interp(1 - skip, kept[order], thresholds[order]))
    if threshold is None:
        found = float(keys.get(metadata.ROUTER_THRESHOLD, 0.5))
        if not 0 <= found <= 1:
            raise InputError(f"{model_path}: {metadata.ROUTER_THRESHOLD} is {found:g}, expected 0 to 1; or give one")
        return found
    return finite("threshold", threshold)


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

    One call at a time: calls from several threads wait for each other, and a call ends a stream that is still open,
    whose next step then raises RuntimeError. FirstBatch answers many at once.

    Args:
        model_path: GGUF file.
        routing: let the routers decide; False runs dense, exactly as the parent does.
        threshold: a layer is kept when its mean score reaches it; default: what the file says.
        skip: share of layers to skip on average, from 0 to 1, instead of a threshold; needs a calibrated file.
        prefill: "full" (the prompt runs all layers) or "skip" (the prompt skips too); default: what the file says.
        mask: bool [n_layer], True = keep, forces the decision; also for files without routers.
        skip_layers: layer indices to skip, the other way to say ``mask``.
        sticky: keep the first decision for a chat that only grows.
        max_ctx: tokens of context where ``n_ctx`` is not given; fewer, and smaller batches, where memory is short.
        **kwargs: arguments of llama_cpp.Llama; ``n_threads`` defaults to the cores this process may use.

    Raises:
        TypeError: an argument that neither this class nor llama_cpp.Llama has.
        ValueError: no such file, not a usable GGUF, mask of the wrong length, prefill or threshold out of range,
            a LoRA file that does not load, an architecture whose layers cannot be skipped, without ``n_ctx`` also a
            file that memory cannot hold.
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
        max_ctx: int = 512,
        **kwargs: Any,
    ):
        for name in kwargs.keys() - inspect.signature(super().__init__).parameters.keys() - _FORMER:
            # The parent takes any, in silence.
            raise TypeError(f"FirstLlama.__init__() got an unexpected keyword argument {name!r}")
        if prefill not in (None, *metadata.PREFILL_MODES):
            raise InputError(f"prefill is {prefill!r}, expected one of {', '.join(metadata.PREFILL_MODES)}")
        kwargs.setdefault("verbose", False)
        # The parent's default seed gives every process the same first answer.
        kwargs.setdefault("seed", random.SystemRandom().getrandbits(31))
        for key in ("n_threads", "n_threads_batch"):
            kwargs[key] = kwargs.get(key) or usable_cpus()
        if kwargs.get("draft_model") is not None:
            kwargs["logits_all"] = True  # as the parent has it, but without rows for all logits
        fit.fill(model_path, kwargs, prefill, max_ctx)
        self._lock = threading.RLock()
        self._turn = 0  # of the call that holds the sequence
        self._open_model(os.fspath(model_path), kwargs)

        self.n_layer: int = llama_cpp.llama_model_n_layer(self.model)
        self.has_routers = native.routed_layers(self.model) > 0
        self.prefill: str = prefill or self.metadata.get(metadata.PREFILL, "full")
        self.window = int(self.metadata.get(metadata.WINDOW, 512))
        # llama.cpp rounds a small context up; the parent's buffers do not follow.
        self._n_cells = min(self.n_ctx(), len(self.input_ids))
        wanted = min(self.window + 1, self._n_cells)  # see eval()
        if self.prefill == "skip" and self.context_params.n_ubatch < wanted:
            # The tokens that decide must be in one micro-batch, or the mask would depend on its size.
            self.close()
            kwargs["n_batch"] = max(wanted, kwargs.get("n_batch", 512))
            kwargs["n_ubatch"] = wanted
            self._open_model(os.fspath(model_path), kwargs)
        self._n_ctx = self._n_cells  # up to which the parent drafts

        self.routing: Routing | None = None
        self.sticky = sticky
        self._forced = self._check_mask(mask, skip_layers)
        self._call: tuple[np.ndarray | None] | None = None  # (mask,) of the call under way
        self._live = _Live()
        self._pending: _Live | None = None
        if not self._logits_all:
            # The parent keeps n_batch rows that nobody fills, and copies them with every saved state.
            self.scores = np.zeros((1, self.n_vocab()), np.single)
        self._threshold: float | None = None
        self._routed = False
        if self.metadata.get("tokenizer.chat_template"):
            handler = chat_formatter_to_chat_completion_handler(self.chat_template)  # type: ignore[arg-type]
            self._chat_handlers[_TEMPLATE] = handler
        if self.chat_handler is None and kwargs.get("chat_format") is None:
            # The parent guesses a format, and without a template takes a wrong one in silence.
            self.chat_format = _TEMPLATE if _TEMPLATE in self._chat_handlers else None
        if kwargs.get("vocab_only"):
            return  # no layers to decide on
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
        lora = kwargs["lora_path"] = os.fspath(kwargs.get("lora_path") or "") or None
        if lora:
            check_file(lora)
        reasons: list[str] = []
        try:
            with native.explained(model_path) as reasons:
                super().__init__(model_path, **kwargs)
        except jinja2.TemplateError as error:
            raise InputError(f"{model_path}: the chat template does not parse: {error}") from error
        except RuntimeError as error:
            if not lora:
                raise
            reason = reasons[0].partition(": ")[2] if reasons else error
            raise InputError(f"{lora}: {reason}") from error

    @property
    def _lora_adapter(self) -> Any:
        return self._adapter

    @_lora_adapter.setter
    def _lora_adapter(self, value: Any) -> None:
        # The parent takes a null pointer for an adapter, and would end the process.
        self._adapter = value or None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is opened with; as at the parent it begins with an empty sequence."""
        own = {"routing": self._routed, "threshold": self.threshold, "mask": self._forced, "sticky": self.sticky}
        return {**super().__getstate__(), **own, "prefill": self.prefill}

    def close(self) -> None:
        """Free the model; using the object afterwards raises RuntimeError. Harmless when done twice."""
        if hasattr(self, "_stack"):  # or the constructor refused its arguments
            with self._lock:
                super().close()
                closed: Any = native.Closed("this FirstLlama is closed")
                self._ctx = self._model = closed

    def _check_open(self) -> None:
        _ = self._ctx.ctx

    def _check_vocab(self) -> None:
        native.check_vocab(self._model.vocab, self.model_path)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8 bytes, as the parent gives them. Raises InputError for a file without a vocabulary."""
        with self._lock:
            self._check_vocab()
            return super().tokenize(text, add_bos, special)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Bytes of token ids; the parent's method loses tokens of more than 32 bytes.

        Raises InputError for a file without a vocabulary, and for ids that it lacks.
        """
        with self._lock:
            self._check_vocab()
            if not isinstance(self.tokenizer_, llama_cpp.LlamaTokenizer):
                native.check_tokens(self._model.vocab, tokens, "the text")
                if prev_tokens is None:
                    return super().detokenize(tokens, None, special)
                # Half a character is U+FFFD to others: its bytes come with the last of its tokens.
                both = [self.tokenizer_.detokenize(ids, None, special) for ids in (prev_tokens, prev_tokens + tokens)]
                before, after = (text.decode("utf-8", "ignore").rstrip("\ufffd") for text in both)
                return after[len(before) :].encode()
            text = native.text_bytes(self._model.vocab, tokens, special)
            # Tokenizers with BOS put a space before the first word.
            return text[1:] if text[:1] == b" " and tokens[0] == self.token_bos() else text

    def is_eog(self, token: int) -> bool:
        """Whether a token ends the answer."""
        with self._lock:
            return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def logits_of(self, position: int) -> np.ndarray:
        """Logits, float32 [n_vocab], that follow the token at ``position``; valid until the next step.

        Without logits_all=True only those of the last token are kept.
        """
        if self._logits_all:
            return self.scores[position]
        if position != self.n_tokens - 1:
            raise InputError(f"logits of token {position} need a model opened with logits_all=True")
        return np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), shape=(self.n_vocab(),))

    def _check_mask(
        self, mask: Sequence[bool] | np.ndarray | None, skip_layers: Sequence[int] | None
    ) -> np.ndarray | None:
        """The forced mask, bool [n_layer], or None. Raises InputError."""
        if mask is None and skip_layers is None:
            return None
        if mask is not None and skip_layers is not None:
            raise InputError("mask and skip_layers exclude each other")
        if skip_layers is not None:
            if isinstance(skip_layers, (str, bytes)) or not isinstance(skip_layers, Iterable):
                raise InputError(f"skip_layers is {reprlib.repr(skip_layers)}, expected a list of layers")
            result = np.ones(self.n_layer, bool)
            for layer in skip_layers:
                if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
                    raise InputError(f"skip_layers holds {reprlib.repr(layer)}, expected layers, such as 0")
                if not 0 <= layer < self.n_layer:
                    raise InputError(f"skip_layers names layer {layer}, the model has layers 0 to {self.n_layer - 1}")
                result[layer] = False
            return result
        return as_mask(mask, self.n_layer)

    @property
    def threshold(self) -> float | None:
        """A layer is kept when its mean score reaches this; None where nothing is routed. May be set between calls."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        with self._lock:
            native.set_threshold(self.ctx, finite("threshold", value))
            self._threshold = float(value)

    @contextlib.contextmanager
    def forcing(self, mask: Sequence[bool] | np.ndarray | None) -> Iterator[None]:
        """Force ``mask``, bool [n_layer], on all calls made inside the with block; None lets the routers decide."""
        before, self._forced = self._forced, self._check_mask(mask, None)
        try:
            yield
        finally:
            self._forced = before

    def _active_mask(self) -> np.ndarray | None:
        """The mask to force on the next prompt, or None where the routers decide or nothing is skipped at all."""
        return self._forced if self._call is None else self._call[0]

    def _reusable(self, tokens: list[int], forced: np.ndarray | None) -> tuple[int, bool]:
        """(leading tokens of the KV cache to keep, whether the pinned mask goes on).

        The last token is computed again, for its logits; with one more, as one alone has other last bits than several.
        """
        live = self._live
        common = min(common_prefix(self.input_ids[: self.n_tokens].tolist(), tokens), len(tokens) - 1)
        prefix = max(0, min(common, len(tokens) - 2))
        if forced is None and not self._routed:
            return (prefix, False) if live.kind in ("empty", "dense") else (min(prefix, live.n_dense), False)
        if forced is not None:
            same = live.kind == "forced" and live.mask == tuple(forced.tolist()) and live.prefill == self.prefill
            if self.prefill == "skip":
                return (prefix, True) if same else (0, False)
            return min(prefix, live.n_dense), False
        if live.kind != "routed" or live.prefill != self.prefill:
            return 0, False
        decided = max(live.n_dense, len(live.deciding))
        if self.sticky and common >= decided:
            return max(prefix, decided), True
        if self.prefill == "full":
            return min(prefix, live.n_dense), False
        same = live.deciding == tuple(tokens[: self.window]) and live.threshold == self.threshold
        return (prefix, True) if same else (0, False)

    def _begin_prompt(self, tokens: list[int]) -> list[int]:
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

    def _end_prompt(self, opened: _Live) -> None:
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

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's embeddings, of all layers: nothing is routed here. Ends a stream that is still open."""
        with self._lock:
            self._turn += 1
            if self._routed:
                native.set_routing(self.ctx, False)
            try:
                return super().embed(*args, **kwargs)
            except BaseException:
                # The parent clears up only behind the last text.
                self._ctx.kv_cache_clear()
                self.reset()
                raise
            finally:
                if self._routed:
                    native.set_routing(self.ctx, True)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens, as the parent does. The first ones after reset() are the prompt that decides."""
        self._check_open()
        with self._lock:
            if len(tokens) and self.n_tokens == 0 and self._pending is None:
                tokens = self._begin_prompt(list(tokens))
            try:
                n_ubatch = self.context_params.n_ubatch
                if len(tokens) > n_ubatch and len(tokens) % n_ubatch == 1:
                    # One token alone has other last bits than several.
                    super().eval(tokens[:-2])
                    tokens = tokens[-2:]
                super().eval(tokens)
                if self._pending is not None:
                    self._end_prompt(self._pending)
                    self._pending = None
            except BaseException:
                if self._pending is not None:
                    # Half a prompt is nothing that a later call could go on from.
                    self.n_tokens, self._pending = 0, None
                raise

    def generate(
        self, tokens: Sequence[int], *args: Any, reset: bool = True, **kwargs: Any
    ) -> Generator[int, Any, None]:
        """Yield tokens, as the parent does, until the context is full.

        Raises ValueError for an empty prompt, one that exceeds n_ctx and tokens that the vocabulary lacks, RuntimeError
        where another call came between.
        """
        with self._lock:
            tokens = native.check_tokens(self._model.vocab, tokens, "the prompt")
            if not tokens and reset:
                raise InputError("the prompt is empty: at least one token must decide")
            if len(tokens) > self._n_cells:
                raise InputError(f"the prompt has {len(tokens)} tokens, the context holds {self._n_cells}")
            self._turn += 1
            turn = self._turn
            if reset:
                tokens = self._begin_prompt(tokens)
            kwargs["reset"] = False
            parent = super().generate(tokens, *args, **kwargs)
            n_read = self.n_tokens + len(tokens)  # before the next token; n_tokens also counts drafts
        received = None
        try:
            while True:
                with self._lock:
                    self._check_open()
                    if turn != self._turn:
                        raise RuntimeError(
                            "another call took this object over: finish a stream first, or use FirstBatch"
                        )
                    try:
                        token = parent.send(received)
                    except StopIteration:
                        return
                    full = n_read >= self._n_cells
                    n_read += 1
                received = yield token
                if full:
                    return
        finally:
            with self._lock:
                parent.close()

    def _create_completion(  # type: ignore[override]  # what the parent's public methods call
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        *,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        seed: int | None = None,
        model: str | None = None,
        logits_processor: Any = None,
        logit_bias: dict[int, float] | None = None,
        **sampling: Any,
    ) -> Iterator[Any]:
        if suffix is not None:
            raise InputError("suffix: filling in the middle is not supported")
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt.encode(), True, True)
            if self._model.add_bos_token() and self.token_bos() not in (-1, *tokens[:1]):
                tokens = [self.token_bos(), *tokens]  # which other tokenizers than llama.cpp's leave out
        else:
            tokens = native.check_tokens(self._model.vocab, prompt, "the prompt")
        if tokens[:2] == [self.token_bos()] * 2:
            warnings.warn("the prompt begins with two BOS tokens; leave out the one in the text", RuntimeWarning, 3)
        room = self._n_cells - len(tokens)
        if room < 1:
            raise InputError(f"the prompt has {len(tokens)} tokens, the context holds {self._n_cells} with the answer")
        if logit_bias:
            bias = {int(token): float(value) for token, value in logit_bias.items()}
            native.check_tokens(self._model.vocab, bias, "logit_bias")

            def biased(_: Any, scores: np.ndarray) -> np.ndarray:
                scores = scores.copy()
                for token, value in bias.items():
                    scores[token] += value
                return scores

            logits_processor = llama_cpp.LogitsProcessorList([*(logits_processor or ()), biased])
        if self.cache:
            self._restore_cached(tokens)
        if seed is None:
            # As the parent draws it, but never LLAMA_DEFAULT_SEED, which makes the sampler draw another.
            seed = random.Random(int(self._seed)).randint(0, 2**32) % (2**32 - 1)
        self.set_seed(seed)
        if 0 < temperature < completion.MIN_TEMPERATURE:
            temperature = 0.0
        steps = self.generate(tokens, temp=temperature, logits_processor=logits_processor, **sampling)
        if self.verbose:
            self._ctx.reset_timings()
        with contextlib.closing(steps):
            for chunk in completion.complete(
                self,
                prompt,
                tokens,
                steps,
                max_tokens=room if max_tokens is None or max_tokens <= 0 else min(max_tokens, room),
                stop=completion.stop_strings(stop),
                logprobs=logprobs,
                echo=echo,
                stream=stream,
                model=self.model_path if model is None else model,
            ):
                if chunk["choices"][0]["finish_reason"]:  # nobody need ask for what comes after the last chunk
                    if self.verbose:
                        self._ctx.print_timings()
                    if self.cache:
                        self.cache[self.input_ids[: self.n_tokens].tolist()] = self.save_state()
                yield chunk

    def _restore_cached(self, tokens: list[int]) -> None:
        """Load the state of set_cache()'s cache that has more of the prompt than the sequence."""
        assert self.cache is not None
        # A cache on disk may hold states of others, which cannot be loaded.
        with contextlib.suppress(KeyError, InputError, RuntimeError):
            state = self.cache[tokens]
            here = common_prefix(self.input_ids[: self.n_tokens].tolist(), tokens)
            if common_prefix(state.input_ids[: state.n_tokens].tolist(), tokens) > here:
                self.load_state(state)

    def _complete(self, result: Any) -> Any:
        """Add the "first" entry."""
        if self.routing is not None:
            result["first"] = self.routing.report()
        return result

    def _answer(self, call: Any, mask: np.ndarray | None) -> Any:
        """Make one request under one mask and add the "first" entry to what comes back, a result or a stream.

        Without ``mask`` it is what forcing() says now, or an outer call: a chat handler calls us in its middle.
        """
        self._check_open()
        with self._lock:
            if mask is None:
                mask = self._active_mask()
            with self._calling(mask):
                result = call()
            if isinstance(result, dict):
                return self._complete(result)
        return self._stream(iter(result), mask)

    @contextlib.contextmanager
    def _calling(self, mask: np.ndarray | None) -> Iterator[None]:
        """Force ``mask``, or let the routers decide; hold the lock around it."""
        before, self._call = self._call, (mask,)
        try:
            yield
        finally:
            self._call = before

    def _stream(self, chunks: Iterator[Any], mask: np.ndarray | None) -> Iterator[Any]:
        while True:
            with self._lock, self._calling(mask):
                try:
                    chunk = self._complete(next(chunks))
                except StopIteration:
                    return
            yield chunk

    def create_completion(self, prompt: str | list[int], *args: Any, **kwargs: Any) -> Any:
        """The parent's completion with a "first" entry.

        ``mask`` or ``skip_layers`` forces this call's decision. ``logprobs`` need logits_all=True only together with
        ``echo``. Raises ValueError for an empty prompt, one that exceeds n_ctx, and a mask of the wrong length.
        """
        if len(prompt) == 0:
            raise InputError("the prompt is empty: at least one token must decide")
        mask = self._check_mask(kwargs.pop("mask", None), kwargs.pop("skip_layers", None))
        return self._answer(lambda: super(FirstLlama, self).create_completion(prompt, *args, **kwargs), mask)

    def __call__(self, prompt: str, *args: Any, **kwargs: Any) -> Any:
        """Same as create_completion."""
        return self.create_completion(prompt, *args, **kwargs)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The template in the file. Raises InputError where there is none, or one that does not parse."""
        return ChatTemplate(self.model_path, self.metadata, self._model.vocab)

    def chat_tokens(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens that create_chat_completion reads for ``messages``, in the file's template. Raises InputError."""
        return self.tokenize(self.chat_template.render(messages).encode("utf-8"), add_bos=False, special=True)

    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """The parent's chat completion with a "first" entry; ``mask`` and ``skip_layers`` as in create_completion.

        Raises ValueError also for a file without a chat template and where the template refuses the messages.
        """
        if not messages:
            raise InputError("messages is empty: at least one message must decide")
        if self.chat_handler is None and self.chat_format is None:
            raise InputError(f"{self.model_path}: no chat template in this file; pass chat_format= or a plain prompt")
        mask = self._check_mask(kwargs.pop("mask", None), kwargs.pop("skip_layers", None))
        return self._answer(lambda: super(FirstLlama, self).create_chat_completion(messages, *args, **kwargs), mask)

    def reset(self) -> None:
        """Forget the sequence and its mask."""
        with self._lock:
            super().reset()
            self._pending = None

    @functools.cached_property
    def _file(self) -> str:
        """Fingerprint of the model and its LoRA."""
        found = fingerprint(self.model_path)
        return f"{found}+{self.lora_scale:g}*{fingerprint(self.lora_path)}" if self.lora_path else found

    def save_state(self) -> Any:
        """The parent's state; keys, values and mask are inside. It may be pickled, and loaded in another process."""
        self._check_open()
        with self._lock:
            state = super().save_state()
            state.input_ids = state.input_ids[: state.n_tokens]
            # rides along when pickled
            state.first = {  # type: ignore[attr-defined]
                "version": STATE_VERSION,
                "file": self._file,
                "logits_all": self._logits_all,
                "live": self._live,
                "routing": self.routing,
            }
            return state

    def load_state(self, state: Any) -> None:
        """Restore keys, values and mask, also from a context of another size.

        Raises ValueError, and leaves everything as it is, for a state of a plain llama_cpp.Llama, of another file or
        of more tokens than the context holds; RuntimeError, with an empty sequence, for damaged data.
        """
        self._check_open()
        first = getattr(state, "first", None)
        if not isinstance(first, dict):
            raise InputError("the state was saved without layer masks, by a plain llama_cpp.Llama")
        if first["version"] != STATE_VERSION:
            raise InputError(f"the state has version {first['version']}, expected {STATE_VERSION}")
        if first["file"] != self._file:
            raise InputError(f"the state was saved with another model file or LoRA than {self.model_path}")
        if state.n_tokens > self._n_cells:
            raise InputError(f"the state holds {state.n_tokens} tokens, the context {self._n_cells}")
        with self._lock:
            self._turn += 1
            self._pending = None
            size = len(state.llama_state)
            blob = (ctypes.c_uint8 * size).from_buffer_copy(state.llama_state)
            read = llama_cpp.llama_state_set_data(self.ctx, blob, size) if size else -1
            if read != size or state.llama_state_size != size:
                # Half a state may have been read: begin afresh.
                self.reset()
                self._ctx.kv_cache_clear()
                self._live = _Live()
                raise RuntimeError("the state is damaged, or its cache has other types of keys and values")
            self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
            self.n_tokens, self._requires_eval, self._seed = state.n_tokens, True, state.seed
            self._live, self.routing = first["live"], first["routing"]
            if self._logits_all and first.get("logits_all"):
                self.scores[: state.n_tokens] = state.scores[: state.n_tokens]
            elif self._logits_all:
                # It may be gone on from, but a prompt that begins the same computes its logits itself.
                self._live = _Live("unscored")

    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """(threshold, mean share of layers kept), float32 [n] each, as measured after training; empty if unknown."""
        with self._lock:
            return native.calibration(self.model)
