"""FirstBatch: many sequences at once, each with its own layers.

Continuous batching on one context: a place that a finished sequence leaves is taken at once. A step computes a token
of all sequences that decode, and pieces of prompts; what several prompts begin with is computed once, where their masks
allow it.
"""

from __future__ import annotations

import os
import random
import reprlib
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any

import numpy as np

from pyfirst import fit, metadata, native
from pyfirst.completion import MIN_TEMPERATURE, Logprobs, TokenLogprob, completion_logprobs, stop_strings
from pyfirst.cpu import usable_cpus
from pyfirst.errors import InputError
from pyfirst.llama import Routing, as_mask, common_prefix, pick_threshold
from pyfirst.text import TextStream

import llama_cpp  # isort: skip  (after native, which points it at our library)
from llama_cpp import _internals as internals  # isort: skip
from llama_cpp._logger import set_verbose  # isort: skip

# Below this a shared prefix is not worth a copy of its keys and values.
MIN_SHARED_PREFIX = 16


@dataclass
class Request:
    """One prompt and how to answer it. Token counts are positive; ``seed`` None draws one."""

    tokens: list[int]
    max_tokens: int = 16
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None  # 0 to 2**32 - 2
    stop: Sequence[str] = ()
    mask: np.ndarray | None = None  # bool [n_layer], forces the decision
    threshold: float | None = None  # of this request; default: the batch's
    logprobs: int | None = None  # how many of the likeliest tokens to report beside the one that came


@dataclass
class Update:
    """What a step added to one request.

    Attributes:
        request: the handle that submit() returned.
        text: new text, complete characters only, never a part of a stop string; may be empty.
        finish_reason: None while the sequence goes on, else "stop" or "length".
        n_generated: tokens of the answer so far, without the one that ends it.
        logprobs: of the tokens that begin in the text shown with this update; empty where nobody asked.
    """

    request: int
    text: str
    finish_reason: str | None
    n_generated: int
    logprobs: list[TokenLogprob] = field(default_factory=list)


_FLOAT_MAX = float(np.finfo(np.float32).max)
_WHOLE, _OPTIONAL = ("max_tokens", "top_k", "seed", "logprobs"), ("seed", "logprobs", "threshold")
# name -> (lowest, highest, whether the lowest itself is allowed)
_RANGES = {
    "temperature": (0, _FLOAT_MAX, True),
    "top_k": (0, 2**31 - 1, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, True),
    "repeat_penalty": (0, _FLOAT_MAX, False),
    "frequency_penalty": (-_FLOAT_MAX, _FLOAT_MAX, True),
    "presence_penalty": (-_FLOAT_MAX, _FLOAT_MAX, True),
}


class _Interrupted(Exception):
    """A prompt was given up while it was computed."""


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: half a step is nothing that a sequence could go on from."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # no Ctrl-C comes here
        return
    late: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda *came: late.append(came))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if late:
            handler(*late[-1])


@dataclass
class _Slot:
    """A sequence of the context at work on a request."""

    handle: int
    request: Request
    sampler: Any
    text: TextStream
    n_past: int = 0
    pending: list[int] = field(default_factory=list)  # tokens to compute next
    n_generated: int = 0
    scored: Logprobs | None = None

    @property
    def reading(self) -> bool:
        """Whether the prompt is still being read."""
        return self.n_past < len(self.request.tokens)


class FirstBatch:
    """Answers many prompts together; each is routed, or forced, on its own.

    Memory beside the model is bounded, and claimed at once: n_parallel * n_ctx cells of keys and values (n_ctx rounded
    up to a multiple of 256), each of n_layer * (key width + value width) * 2 bytes in f16, skipped layers included; the
    logits, n_parallel * vocabulary * 4 bytes; and what a step of n_batch tokens computes, mostly n_batch * vocabulary *
    4 bytes. What the prompts of finished sequences left there serves the next prompts that begin alike.

    May be used from several threads; their requests share the batch. With Q4_0 weights and without kv_unified an answer
    at temperature 0 is that of its prompt alone, to the last bit of its log-probabilities; with other types last bits
    of what is decoded may depend on how many sequences decode.

    Args:
        model_path: GGUF file.
        n_parallel: sequences at once.
        n_ctx: tokens per sequence, prompt and answer together; at most what the model was trained for.
        max_ctx: n_ctx where that is not given; less where memory is short.
        routing, threshold, skip, prefill: as in FirstLlama.
        n_batch: tokens that one step computes at most; default: 512, less where memory is short.
        n_threads: default: the cores this process may use.
        kv_unified: one pool of n_parallel * n_ctx cells for all sequences instead of one per sequence. As in the
            unpatched llama.cpp, with quantized weights logits then depend on where in it a sequence lies.
        flash_attn: as in llama_cpp.Llama; off by default there and here, so that answers are the same.
        type_k, type_v: ggml types of keys and values (default f16).
        verbose: show llama.cpp's log.

    Attributes:
        step_seconds: None, or how long a step should take at most: it reads so much less of the prompts. With prefill
            "skip" the tokens that decide are read in one step all the same.

    Raises:
        ValueError: as FirstLlama.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_parallel: int = 8,
        n_ctx: int | None = None,
        max_ctx: int = 512,
        routing: bool = True,
        threshold: float | None = None,
        skip: float | None = None,
        prefill: str | None = None,
        n_batch: int | None = None,
        n_threads: int | None = None,
        kv_unified: bool = False,
        flash_attn: bool = False,
        type_k: int | None = None,
        type_v: int | None = None,
        verbose: bool = False,
    ):
        for name, value, least in (
            ("n_parallel", n_parallel, 1),
            ("n_ctx", n_ctx, 2),
            ("n_batch", n_batch, 1),
            ("n_threads", n_threads, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        limit = llama_cpp.llama_max_parallel_sequences()
        if n_parallel > limit:
            raise InputError(f"n_parallel is {n_parallel}, llama.cpp holds {limit} sequences")
        if prefill not in (None, *metadata.PREFILL_MODES):
            raise InputError(f"prefill is {prefill!r}, expected one of {', '.join(metadata.PREFILL_MODES)}")
        self.model_path = os.fspath(model_path)
        self.n_parallel, self.verbose = n_parallel, verbose
        self.n_threads = n_threads or usable_cpus()
        sizes = fit.plan(
            model_path,
            n_ctx=n_ctx,
            max_ctx=max_ctx,
            n_batch=n_batch,
            n_seq=n_parallel,
            prefill=prefill,
            type_k=type_k,
            type_v=type_v,
            threads=self.n_threads,
            scores=False,
            verbose=verbose,
        )
        set_verbose(verbose)
        model_params = llama_cpp.llama_model_default_params()
        if not sizes.use_mmap:
            model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        with native.explained(self.model_path):
            self._model = internals.LlamaModel(path_model=self.model_path, params=model_params, verbose=verbose)
        native.check_vocab(self._model.vocab, self.model_path)
        self.metadata: dict[str, str] = self._model.metadata()
        self.n_ctx = n_ctx = min(sizes.n_ctx, self._model.n_ctx_train() or sizes.n_ctx)
        self.n_layer: int = llama_cpp.llama_model_n_layer(self._model.model)
        self.prefill = prefill or self.metadata.get(metadata.PREFILL, "full")
        self.window = int(self.metadata.get(metadata.WINDOW, 512))
        n_batch = max(sizes.n_batch, n_parallel + 2)  # a token for each that decodes, three of a prompt
        if self.prefill == "skip":
            n_batch = max(n_batch, min(self.window + 1, n_ctx))
        self.n_batch = n_batch

        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = n_parallel
        params.n_ctx = n_ctx * n_parallel
        # One micro-batch: of a batch in several, with kv_unified and a sliding window, llama.cpp gives cells that an
        # earlier one still reads to a later one.
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = kv_unified
        params.flash_attn_type = int(flash_attn)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
        if type_k is not None:
            params.type_k = type_k
        if type_v is not None:
            params.type_v = type_v
        with native.explained(self.model_path):
            self._ctx = internals.LlamaContext(model=self._model, params=params, verbose=verbose)
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)

        self.threshold: float | None = None
        if not native.routed_layers(self._model.model) and (threshold is not None or skip is not None):
            raise InputError(f"{self.model_path}: no routers in this file, so a threshold or skip decides nothing")
        if routing and native.routed_layers(self._model.model):
            self.threshold = pick_threshold(self._model.model, self.model_path, self.metadata, threshold, skip)
            native.set_threshold(self._ctx.ctx, self.threshold)
            native.set_routing(self._ctx.ctx, True)
        self.prefill = metadata.PREFILL_MODES[
            native.set_prefill(self._ctx.ctx, metadata.PREFILL_MODES.index(self.prefill))
        ]

        self._abort = native.AbortFlag(self._ctx.ctx)
        self._abort_lock = threading.Lock()
        self._alone: int | None = None  # the request whose prompt is being computed, by itself
        self.step_seconds: float | None = None
        self._tokens_per_second = 0.0  # of the latest step that read prompts
        self._lock = threading.RLock()
        # Keeps the model alive, for what need not wait for a step; taken after _lock where both are.
        self._alive = threading.RLock()
        self._slots: list[_Slot | None] = [None] * n_parallel
        self._held: list[_Slot | None] = [None] * n_parallel  # whose prompt's keys and values a sequence holds
        self._waiting: deque[tuple[int, Request]] = deque()
        self._next_handle = 0
        self._routings: dict[int, Routing] = {}
        self._mail: dict[int, deque[Update]] = {}  # of requests that generate() runs
        self._unclaimed: deque[Update] = deque()  # of the others, for step() to return

    def close(self) -> None:
        """Free the context and the model; using the object afterwards raises RuntimeError."""
        with self._lock, self._alive:
            if isinstance(self._ctx, native.Closed):
                return
            for seq in range(self.n_parallel):
                self._release(seq)
            llama_cpp.llama_batch_free(self._batch)
            self._ctx.close()
            self._model.close()
            closed: Any = native.Closed("this FirstBatch is closed")
            self._ctx = self._model = closed

    def _check_open(self) -> None:
        _ = self._ctx.ctx

    def __enter__(self) -> FirstBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def vocab(self) -> Any:
        """llama_vocab pointer of the model."""
        return self._model.vocab

    def tokenize(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a prompt, with BOS where the model wants one and ``add_bos`` allows it.

        Raises InputError for what is not Unicode, and for a text so long that no sequence holds it, before it is read.
        """
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the prompt is not Unicode text: character {error.start} is half a surrogate pair"
            ) from None
        with self._alive:
            if len(raw) > 16 * self.n_ctx and len(raw) >= self._longest_token * self.n_ctx:
                least = len(raw) // self._longest_token
                raise InputError(
                    f"the prompt has {least} tokens or more, a sequence holds {self.n_ctx} with the answer"
                )
            return self._model.tokenize(raw, add_bos and self._model.add_bos_token(), True)

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of text that no token exceeds; what the vocabulary shows is never shorter than what it stands for."""
        texts = (llama_cpp.llama_vocab_get_text(self.vocab, i) for i in range(self._model.n_vocab()))
        return max(len(text or b"") for text in texts)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens and what is not UTF-8. Raises InputError for unknown ids."""
        with self._alive:
            return native.text_bytes(self._model.vocab, tokens).decode("utf-8", "ignore")

    def answer_start(self, prompt: str | Sequence[int], logprobs: int | None) -> int:
        """Characters of a prompt, where its log-probabilities begin; 0 where none are asked for and none will look."""
        if logprobs is None:
            return 0
        return len(prompt if isinstance(prompt, str) else self.text(prompt))

    def threshold_for(self, skip: float) -> float:
        """The threshold that skips this share of layers on average, from 0 to 1. Raises InputError."""
        with self._alive:
            return pick_threshold(self._model.model, self.model_path, self.metadata, None, skip)

    def check(self, request: Request) -> None:
        """Raise InputError, with the numbers, if a request cannot be served; tokens, stop and mask get their types."""
        with self._alive:
            request.tokens = native.check_tokens(self._model.vocab, request.tokens, "the prompt")
        n = len(request.tokens)
        if n == 0:
            raise InputError("the prompt is empty: at least one token must decide")
        if n >= self.n_ctx:
            raise InputError(f"the prompt has {n} tokens, a sequence holds {self.n_ctx} with the answer")
        # What ctypes refuses only later would take the other requests of a step along.
        for name in ("max_tokens", *_RANGES, *_OPTIONAL):
            value = getattr(request, name)
            kinds = (int, np.integer) if name in _WHOLE else (int, float, np.integer, np.floating)
            if isinstance(value, bool) or not (isinstance(value, kinds) or (value is None and name in _OPTIONAL)):
                wanted = "a whole number" if name in _WHOLE else "a number"
                raise InputError(f"{name} is {reprlib.repr(value)}, expected {wanted}")
        request.stop = stop_strings(request.stop)
        if request.max_tokens < 1:
            raise InputError(f"max_tokens is {request.max_tokens}, expected at least 1")
        for name, (low, high, closed) in _RANGES.items():
            value = getattr(request, name)
            if not (low < value <= high or (closed and value == low)):
                limits = f"more than {low}" if not closed else f"{low:g} or more"
                raise InputError(f"{name} is {reprlib.repr(value)}, expected {limits}, at most {high:g}")
        if request.logprobs is not None and request.logprobs < 0:
            raise InputError(f"logprobs is {request.logprobs}, expected 0 or more")
        if request.seed is not None and not 0 <= request.seed < 2**32 - 1:
            raise InputError(f"seed is {request.seed}, expected 0 to {2**32 - 2}")
        if request.mask is not None:
            request.mask = as_mask(request.mask, self.n_layer)
        if request.threshold is not None and self.threshold is None:
            raise InputError(
                f"threshold is {request.threshold}, but nothing is routed: no routers in the file, or routing is off"
            )
        if request.threshold is not None and not abs(request.threshold) <= _FLOAT_MAX:
            raise InputError(f"threshold is {request.threshold}, expected a number of at most {_FLOAT_MAX:g}")

    def submit(self, request: Request) -> int:
        """Queue a request and return its handle. Raises InputError if it cannot be served."""
        self.check(request)
        with self._lock:
            handle = self._next_handle
            self._next_handle += 1
            self._waiting.append((handle, request))
        return handle

    def interrupt(self, handle: int) -> None:
        """End what is computed of a request's prompt, without waiting for it; cancel() must follow."""
        with self._abort_lock:
            if handle == self._alone:
                self._abort.on = True

    def cancel(self, handle: int) -> None:
        """Forget a request; its sequence is free for the next one. Unknown handles are ignored."""
        self.interrupt(handle)
        with self._lock:
            self._waiting = deque((h, r) for h, r in self._waiting if h != handle)
            for seq, slot in enumerate(self._slots):
                if slot is not None and slot.handle == handle:
                    self._release(seq)
            self._routings.pop(handle, None)
            self._mail.pop(handle, None)
            self._unclaimed = deque(update for update in self._unclaimed if update.request != handle)

    @property
    def n_active(self) -> int:
        """Sequences at work."""
        return sum(slot is not None for slot in self._slots)

    @property
    def n_waiting(self) -> int:
        """Requests without a sequence yet."""
        return len(self._waiting)

    def routing(self, handle: int) -> Routing | None:
        """What was decided for a request; None before its prompt has been read or after take_routing()."""
        return self._routings.get(handle)

    def take_routing(self, handle: int) -> Routing | None:
        """As routing(), and forget it."""
        return self._routings.pop(handle, None)

    def _release(self, seq: int) -> None:
        """Free a sequence; what its prompt left stays until another prompt needs the place."""
        slot = self._slots[seq]
        if slot is None:
            return
        slot.sampler.close()
        self._slots[seq] = None
        slot.n_past = min(slot.n_past, len(slot.request.tokens))
        if slot.n_past == 0 or not self._ctx.kv_cache_seq_rm(seq, slot.n_past, -1):
            self._empty(seq)

    def _empty(self, seq: int) -> None:
        self._held[seq] = None
        self._ctx.kv_cache_seq_rm(seq, -1, -1)

    def _sampler(self, request: Request) -> Any:
        """The same chain as llama_cpp.Llama's."""
        sampler = internals.LlamaSampler()
        sampler.add_penalties(
            self._model.n_vocab(), 64, request.repeat_penalty, request.frequency_penalty, request.presence_penalty
        )
        if request.temperature < MIN_TEMPERATURE:
            sampler.add_greedy()
            return sampler
        sampler.add_top_k(request.top_k)
        sampler.add_top_p(request.top_p, 1)
        sampler.add_min_p(request.min_p, 1)
        sampler.add_temp(request.temperature)
        sampler.add_dist(random.SystemRandom().getrandbits(32) if request.seed is None else request.seed)
        return sampler

    def _threshold_of(self, request: Request) -> float:
        assert self.threshold is not None
        return self.threshold if request.threshold is None else request.threshold

    def _routed(self, request: Request) -> bool:
        return request.mask is None and self.threshold is not None

    def _mask(self, request: Request) -> np.ndarray:
        """The mask of a request that is not routed."""
        return np.ones(self.n_layer, bool) if request.mask is None else request.mask

    def _common(self, held: _Slot, request: Request) -> int:
        """Leading tokens for which both prompts have the same keys, values and scores."""
        other = held.request
        routed = self._routed(request)
        if routed and not self._routed(other):
            return 0
        if self.prefill == "skip":
            # Even the prompt depends on the mask: on what decided, or on what was forced.
            if routed:
                same = (
                    self._threshold_of(other) == self._threshold_of(request)
                    and other.tokens[: self.window] == request.tokens[: self.window]
                )
            else:
                same = not self._routed(other) and bool((self._mask(other) == self._mask(request)).all())
            if not same:
                return 0
        n = min(common_prefix(other.tokens, request.tokens), len(request.tokens) - 2)  # see _parts()
        return n if n >= MIN_SHARED_PREFIX else 0

    def _fill(self) -> None:
        """Give free sequences to waiting requests, in order; one waits on where another reads its beginning."""
        kept: deque[tuple[int, Request]] = deque()
        try:
            while self._waiting and None in self._slots and len(kept) < self.n_parallel:
                handle, request = self._waiting.popleft()
                donor, n, soon = None, 0, 0
                for seq, held in enumerate(self._held):
                    if held is not None:
                        common = self._common(held, request)
                        here = min(common, held.n_past)
                        if here > n:
                            donor, n = seq, here
                        if self._slots[seq] is not None and held.reading:
                            soon = max(soon, common)
                if soon >= n + MIN_SHARED_PREFIX:
                    kept.append((handle, request))
                    continue
                if donor is not None and self._slots[donor] is None:
                    seq = donor
                else:
                    # A sequence that holds nothing, or else what has been there longest.
                    free = [i for i, slot in enumerate(self._slots) if slot is None]
                    seq = min(free, key=lambda i: -1 if (held := self._held[i]) is None else held.handle)
                self._start(seq, handle, request, donor, n if donor is not None else 0)
        finally:
            self._waiting.extendleft(reversed(kept))

    def _start(self, seq: int, handle: int, request: Request, donor: int | None, shared: int) -> None:
        """Give a sequence to a request, with ``shared`` tokens that ``donor`` holds."""
        ctx, held = self._ctx.ctx, None if donor is None else self._held[donor]
        if donor is not None and donor != seq:
            self._empty(seq)
            self._ctx.kv_cache_seq_cp(donor, seq, -1, -1)
        if held is None or not self._ctx.kv_cache_seq_rm(seq, shared, -1):
            held, shared = None, 0
            self._empty(seq)
        decided = self.prefill == "skip" and held is not None
        if decided:
            pass  # the mask came along
        elif self._routed(request):
            native.begin(ctx, seq)
        elif self.prefill == "skip":
            native.set_mask(ctx, self._mask(request), seq)
        elif self.threshold is not None or held is not None:
            # Without a mask of its own an empty sequence would be routed.
            native.set_mask(ctx, np.ones(self.n_layer, bool), seq)
        slot = _Slot(handle, request, self._sampler(request), TextStream(request.stop))
        slot.n_past, slot.pending = shared, request.tokens[shared:]
        if request.logprobs is not None:
            slot.scored = Logprobs(request.logprobs, partial(native.token_bytes, self._model.vocab))
        self._slots[seq] = self._held[seq] = slot

    def _prompt_done(self, seq: int, slot: _Slot) -> None:
        """The whole prompt has been read: pin the mask."""
        ctx = self._ctx.ctx
        if self._routed(slot.request):
            native.commit(ctx, seq)  # leaves a mask that is pinned already
            pinned = native.get_mask(ctx, self.n_layer, seq)
            assert pinned is not None
            scores = native.get_scores(ctx, self.n_layer, seq)
            routing = Routing(pinned, scores, self.prefill, self._threshold_of(slot.request))
        else:
            if self.prefill == "full" and slot.request.mask is not None:
                native.set_mask(ctx, slot.request.mask, seq)
            routing = Routing(self._mask(slot.request), None, self.prefill, None)
        self._routings[slot.handle] = routing

    def step(self) -> list[Update]:
        """Compute a token of each sequence that decodes, then prompts in order of arrival as far as n_batch allows.

        Returns the updates of requests that were submit()ted, also those that a generate() in another thread has
        computed meanwhile; its own go there.
        """
        with self._lock:
            self._deliver()
            mine = list(self._unclaimed)
            self._unclaimed.clear()
            return mine

    def _deliver(self) -> None:
        """Compute a step; each update reaches whom it belongs to before what follows it can fail."""
        self._check_open()
        with _uninterrupted():
            self._fill()
            parts = self._parts()
            start = time.perf_counter()
            n = 0
            for part in parts:
                try:
                    for update in self._compute(part):
                        self._mail.get(update.request, self._unclaimed).append(update)
                    n += sum(part.values())
                except _Interrupted:
                    self._release(*part)
            if n > self.n_parallel:  # mostly prompts
                self._tokens_per_second = n / (time.perf_counter() - start)

    def _parts(self) -> list[dict[int, int]]:
        """Tokens of each sequence for a step, one dictionary for each llama_decode.

        Those that decode share the first. Each piece of a prompt has its own, in order of arrival: of prompts side by
        side llama.cpp computes pieces as long as its neighbours', and one token alone has other last bits than several.
        """
        slots = {seq: slot for seq, slot in enumerate(self._slots) if slot is not None}
        parts = [{seq: 1 for seq, slot in slots.items() if not slot.reading}]
        room = self._room() - len(parts[0])
        for seq, slot in sorted(slots.items(), key=lambda item: item[1].handle):
            if slot.reading:
                n = self._piece(slot, room, len(parts) == 1)
                if n == 0:
                    break
                parts.append({seq: n})
                room -= n
        return [part for part in parts if part]

    def _piece(self, slot: _Slot, room: int, first: bool) -> int:
        """Tokens of a prompt to read now, 0 where the room is too small; never one, and never all but one, of several.

        What decides in "skip" is read at once, whatever the room if it is the ``first`` of a step.
        """
        left = len(slot.pending)
        if slot.n_past == 0 and self.prefill == "skip" and self._routed(slot.request):
            least = min(left, self.window + 1)
            if room < least and not first:
                return 0
            room = max(room, least)
        if left <= room:
            return left
        n = room - (left - room == 1)
        return n if n > 1 else 0

    def _compute(self, part: dict[int, int]) -> Iterator[Update]:
        """Compute so many tokens of each of these sequences at once; a sequence then samples if it has no more."""
        rows: dict[int, int] = {}
        n = 0
        for seq, count in part.items():
            slot = self._slots[seq]
            assert slot is not None
            if slot.reading and self._routed(slot.request):
                # The context knows one threshold only: that of the decision that may fall now.
                native.set_threshold(self._ctx.ctx, self._threshold_of(slot.request))
            for i, token in enumerate(slot.pending[:count]):
                self._batch.token[n], self._batch.pos[n] = token, slot.n_past + i
                self._batch.n_seq_id[n], self._batch.seq_id[n][0] = 1, seq
                self._batch.logits[n] = i == len(slot.pending) - 1
                n += 1
            rows[seq] = n - 1
        self._batch.n_tokens = n
        with self._interruptible(part):
            self._decode()
        for seq, row in rows.items():
            slot = self._slots[seq]
            assert slot is not None
            slot.n_past += part[seq]
            slot.pending = slot.pending[part[seq] :]
            if slot.n_past == len(slot.request.tokens):
                self._prompt_done(seq, slot)
            if not slot.pending:
                yield self._accept(seq, slot, slot.sampler.sample(self._ctx, row), row)

    def _room(self) -> int:
        """Tokens that the next step may compute; those of sequences that decode always fit."""
        if self.step_seconds is None:
            return self.n_batch
        return min(self.n_batch, max(self.n_parallel + 16, int(self.step_seconds * self._tokens_per_second)))

    def _decode(self) -> None:
        status = llama_cpp.llama_decode(self._ctx.ctx, self._batch)
        if status == native.ABORTED:
            raise _Interrupted
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    @contextmanager
    def _interruptible(self, part: dict[int, int]) -> Iterator[None]:
        """Inside the block interrupt() ends what is computed, where it is the prompt of one request alone."""
        slots = [slot for seq in part if (slot := self._slots[seq]) is not None]
        with self._abort_lock:
            self._alone = slots[0].handle if len(slots) == 1 and slots[0].reading else None
        try:
            yield
        finally:
            with self._abort_lock:
                self._alone, self._abort.on = None, False

    def _accept(self, seq: int, slot: _Slot, token: int, row: int) -> Update:
        """Take a token sampled from a row of the batch; free the sequence if it was the last."""
        reason = None
        if llama_cpp.llama_vocab_is_eog(self._model.vocab, token):
            text, reason = slot.text.finish(), "stop"
        else:
            slot.n_generated += 1
            if slot.scored is not None:
                logits = np.ctypeslib.as_array(self._ctx.get_logits_ith(row), (self._model.n_vocab(),))
                slot.scored.add(token, slot.text.n_read, logits)
            text, stopped = slot.text.feed(native.token_bytes(self._model.vocab, token))
            if stopped:
                reason = "stop"
            elif slot.n_generated >= slot.request.max_tokens or slot.n_past + 1 >= self.n_ctx:
                text, reason = text + slot.text.finish(), "length"
            slot.pending = [token]
        scored: list[TokenLogprob] = []
        if slot.scored is not None:
            whole = reason is not None and slot.text.n_shown == slot.text.n_read
            scored = slot.scored.take(None if whole else slot.text.n_shown)
        if reason:
            self._release(seq)
        return Update(slot.handle, text, reason, slot.n_generated, scored)

    def generate(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        max_tokens: int | Sequence[int] = 16,
        masks: Iterable[Sequence[bool] | np.ndarray | None] | None = None,
        stop: str | Sequence[str | Sequence[str] | None] | None = (),
        stream: bool = False,
        **sampling: Any,
    ) -> Any:
        """Answer all prompts; completion dicts in their order, or with ``stream`` (index, chunk dict) as they come.

        Args:
            prompts: texts or token ids.
            max_tokens: per answer, one number or one per prompt.
            masks: bool [n_layer] per prompt, None where the routers decide.
            stop: strings that end an answer: one, a list for all, or a list of lists, one per prompt.
            stream: yield chunks of all answers, interleaved, as they are computed.
            **sampling: other fields of Request, such as temperature and seed: one value or one per prompt.

        Raises:
            ValueError: empty or overlong prompt, mask of the wrong length, lists of different lengths, values of a
                wrong type or out of range.
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts is {reprlib.repr(prompts)}, expected a list of texts or of lists of token ids")
        if not (masks is None or isinstance(masks, Iterable)):
            raise InputError(f"masks is {reprlib.repr(masks)}, expected a list with one for each prompt")
        prompts, masks = list(prompts), None if masks is None else list(masks)
        names = tuple(f.name for f in fields(Request) if f.name not in ("tokens", "max_tokens", "stop", "mask"))
        unknown = sorted(set(sampling) - set(names))
        if unknown:
            raise InputError(f"unknown argument '{unknown[0]}' (known: {', '.join(names)})")

        def one(name: str, value: Any, i: int) -> Any:
            if not isinstance(value, (list, tuple)):
                return value
            if len(value) != len(prompts):
                raise InputError(f"{name} has {len(value)} entries for {len(prompts)} prompts")
            return value[i]

        if masks is not None and len(masks) != len(prompts):
            raise InputError(f"masks has {len(masks)} entries for {len(prompts)} prompts")
        one_stop = isinstance(stop, (str, bytes)) or not isinstance(stop, Iterable)
        stops: list[Any] = [] if stop is None else [stop] if one_stop else list(stop)
        each = any(not isinstance(entry, str) for entry in stops)
        if each and len(stops) != len(prompts):
            raise InputError(f"stop has {len(stops)} entries for {len(prompts)} prompts")
        requests = [
            Request(
                self.tokenize(prompt) if isinstance(prompt, str) else prompt,  # type: ignore[arg-type]
                max_tokens=one("max_tokens", max_tokens, i),
                stop=stops[i] if each else stops,
                mask=None if masks is None or masks[i] is None else np.asarray(masks[i]),
                **{name: one(name, value, i) for name, value in sampling.items()},
            )
            for i, prompt in enumerate(prompts)
        ]
        for i, request in enumerate(requests):
            try:
                self.check(request)
            except InputError as error:
                raise InputError(f"prompt {i}: {error}") from None
        asked = zip(prompts, requests, strict=True)
        starts = [self.answer_start(prompt, request.logprobs) for prompt, request in asked]
        events = self._run(requests, starts)
        if stream:
            return events
        done: list[dict[str, Any]] = [{} for _ in prompts]
        texts, scored = [""] * len(prompts), [dict[str, list]() for _ in prompts]
        for i, chunk in events:
            choice = chunk["choices"][0]
            texts[i] += choice["text"]
            for name, column in (choice["logprobs"] or {}).items():
                scored[i].setdefault(name, []).extend(column)
            if choice["finish_reason"]:
                choice["text"], choice["logprobs"] = texts[i], scored[i] or None
                done[i] = chunk
        return done

    def _run(self, requests: list[Request], starts: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        handles: dict[int, int] = {}
        names = [f"cmpl-{uuid.uuid4()}" for _ in requests]
        try:
            with self._lock, _uninterrupted():
                for i, request in enumerate(requests):
                    handle = self.submit(request)
                    handles[handle], self._mail[handle] = i, deque()
            while handles:
                with self._lock:
                    if not any(self._mail[handle] for handle in handles):
                        self._deliver()
                    updates = [update for handle in handles for update in self._mail[handle]]
                    for handle in handles:
                        self._mail[handle].clear()
                for update in updates:
                    i = handles[update.request]
                    chunk = self._chunk(names[i], requests[i], update, starts[i])
                    if update.finish_reason:
                        self.take_routing(update.request)
                        del handles[update.request], self._mail[update.request]
                    yield i, chunk
        finally:
            with self._lock, _uninterrupted():
                for handle in handles:
                    self.cancel(handle)

    def _chunk(self, name: str, request: Request, update: Update, start: int) -> dict[str, Any]:
        routing = self._routings[update.request]
        return {
            "id": name,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model_path,
            "choices": [
                {
                    "text": update.text,
                    "index": 0,
                    "logprobs": completion_logprobs(update.logprobs, start),
                    "finish_reason": update.finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": len(request.tokens),
                "completion_tokens": update.n_generated,
                "total_tokens": len(request.tokens) + update.n_generated,
            },
            "first": routing.report(),
        }


def first_options(batch: FirstBatch, first: Any) -> dict[str, Any]:
    """The JSON field "first" of a request, {threshold, skip, dense, mask}, as fields of Request.

    Raises InputError for an unknown key, more than one of them, and values of the wrong type or length.
    """
    if not isinstance(first, dict):
        raise InputError(f"first is a {type(first).__name__}, expected an object")
    known: dict[str, tuple[tuple[type, ...], str]] = {
        "threshold": ((int, float), "a number below 1e9"),
        "skip": ((int, float), "a share of layers from 0 to 1"),
        "dense": ((bool,), "true or false"),
        "mask": ((list,), "a list of true and false"),
    }
    for name, value in first.items():
        if name not in known:
            raise InputError(f"first: unknown field {reprlib.repr(name)} (known: {', '.join(known)})")
        kinds, expected = known[name]
        wrong = not isinstance(value, kinds) or (name != "dense" and isinstance(value, bool))
        wrong = wrong or (isinstance(value, (int, float)) and not abs(value) < 1e9)
        wrong = wrong or (isinstance(value, list) and not all(isinstance(keep, bool) for keep in value))
        if value is not None and wrong:
            raise InputError(f"first.{name} is {reprlib.repr(value)}, expected {expected}")
    given = {name: value for name, value in first.items() if value is not None and value is not False}
    if len(given) > 1:
        raise InputError(f"first: {' and '.join(given)} exclude each other")
    if "dense" in given:
        return {"mask": np.ones(batch.n_layer, bool)}
    if "mask" in given:
        return {"mask": np.array(given["mask"], bool)}
    if "skip" in given:
        return {"threshold": batch.threshold_for(given["skip"]), "mask": None}
    return {"threshold": float(given["threshold"]), "mask": None} if given else {}
