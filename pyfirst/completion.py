"""Completions from a FirstLlama, whole or streamed, and log-probabilities in OpenAI's forms.

llama_cpp.Llama's own streaming loses what follows an invalid byte, can run past max_tokens in the middle of a
character, and cuts at the first stop string of the list instead of the first in the text; here one loop makes both
forms, so that the pieces of a stream always add up to the whole.
"""

from __future__ import annotations

import codecs
import reprlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfirst import native  # noqa: F401  points llama_cpp at our library
from pyfirst.errors import InputError
from pyfirst.text import TextStream

import llama_cpp  # isort: skip

if TYPE_CHECKING:
    from pyfirst.llama import FirstLlama


# Below this only the likeliest token is left, and logits divided by it may be infinite.
MIN_TEMPERATURE = 1e-30


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """One, several or no strings that end an answer. Raises InputError for anything else."""
    if stop is None or isinstance(stop, str):
        return () if stop is None else (stop,)
    found = tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if not all(isinstance(entry, str) for entry in found):
        raise InputError(f"stop is {reprlib.repr(stop)}, expected a string or a list of strings")
    return found


@dataclass
class TokenLogprob:
    """A token of an answer and what else was likely there.

    Attributes:
        piece: the token's bytes.
        offset: character of the text where it begins.
        logprob: natural logarithm of its probability before any sampling; None where nothing came before it.
        top: (bytes, logprob) of the likeliest tokens, the best first.
    """

    piece: bytes
    offset: int
    logprob: float | None
    top: list[tuple[bytes, float]]

    @property
    def text(self) -> str:
        return _text(self.piece)


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "ignore")


class Logprobs:
    """Log-probabilities of tokens, let go once the text of their token is shown.

    Args:
        top: how many of the likeliest tokens to report beside the one that came.
        piece: bytes of a token.
    """

    def __init__(self, top: int, piece: Callable[[int], bytes]):
        if top < 0:
            raise InputError(f"logprobs is {top}, expected 0 or more")
        self.top, self.piece = top, piece
        self.entries: list[TokenLogprob] = []

    def add(self, token: int, offset: int, logits: np.ndarray | None) -> None:
        """A token whose text begins at character ``offset``; logits [n_vocab] are None where nothing came before."""
        if logits is None:
            self.entries.append(TokenLogprob(self.piece(token), offset, None, []))
            return
        values = llama_cpp.Llama.logits_to_logprobs(logits)
        best = np.argsort(-values, kind="stable")[: self.top].tolist() if self.top else []
        top = [(self.piece(i), float(values[i])) for i in best]
        self.entries.append(TokenLogprob(self.piece(token), offset, float(values[token]), top))

    def take(self, n_shown: int | None = None) -> list[TokenLogprob]:
        """Entries of tokens whose text begins before character ``n_shown``, or all."""
        n = sum(n_shown is None or entry.offset < n_shown for entry in self.entries)
        taken, self.entries = self.entries[:n], self.entries[n:]
        return taken


def _by_text(top: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    """The best of those with the same text, which are parts of characters, the best first."""
    found: dict[str, float] = {}
    for piece, value in top:
        found.setdefault(_text(piece), value)
    return found


def completion_logprobs(entries: Sequence[TokenLogprob], start: int = 0) -> dict[str, list] | None:
    """OpenAI's form for /v1/completions, None if there are none; ``start`` is added to the offsets."""
    if not entries:
        return None
    return {
        "text_offset": [start + entry.offset for entry in entries],
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            None if entry.logprob is None else {**_by_text(entry.top), entry.text: entry.logprob} for entry in entries
        ],
    }


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """OpenAI's form for /v1/chat/completions, None if there are none."""
    if not entries:
        return None

    def one(piece: bytes, value: float | None) -> dict[str, Any]:
        return {"token": _text(piece), "logprob": value, "bytes": list(piece)}

    return {
        "content": [
            {**one(entry.piece, entry.logprob), "top_logprobs": [one(*best) for best in entry.top]} for entry in entries
        ],
        "refusal": None,
    }


def _score_prompt(llm: FirstLlama, scored: Logprobs, tokens: list[int], asked: str, special: bool) -> None:
    """Put the prompt's tokens first, without BOS; the first has nothing to be compared with.

    They end where the text ``asked`` ends. ``special``: control tokens have their names in it.
    """
    later, scored.entries = scored.entries, []
    first = int(tokens[0] == llm.token_bos())
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    lengths = [len(decoder.decode(llm.detokenize([token], special=special))) for token in tokens[first:]]
    offset = len(asked) - sum(lengths)
    for i, length in enumerate(lengths, first):
        scored.add(tokens[i], max(offset, 0), llm.logits_of(i - 1) if i > first else None)
        offset += length
    scored.entries += later


def _pieces(
    llm: FirstLlama,
    tokens: list[int],
    steps: Iterable[int],
    generated: list[int],
    max_tokens: int,
    text: TextStream,
    scored: Logprobs | None,
    start: int,
) -> Iterator[tuple[str, str | None]]:
    """(text to show, None or the reason to finish) for each step; what came is appended to ``generated``."""
    for token in steps:
        if llm.is_eog(token):
            break
        before = start + text.n_read
        shown, stopped = text.feed(llm.detokenize([token], prev_tokens=tokens + generated))
        generated.append(token)
        if scored is not None:
            scored.add(token, before, llm.logits_of(len(tokens) + len(generated) - 2))
        if stopped:
            yield shown, "stop"
            return
        if len(generated) >= max_tokens:
            yield shown + text.finish(), "length"
            return
        yield shown, None
    yield text.finish(), "stop"


def complete(
    llm: FirstLlama,
    prompt: str | Sequence[int],
    tokens: list[int],
    steps: Iterable[int],
    *,
    max_tokens: int,
    stop: Sequence[str],
    logprobs: int | None,
    echo: bool,
    stream: bool,
    model: str,
) -> Iterator[dict[str, Any]]:
    """Completion chunks in OpenAI's form, or without ``stream`` the one completion.

    Args:
        llm: whose logits belong to the latest of ``steps``.
        prompt, tokens: as given, and as token ids.
        steps: generated tokens; their end before ``max_tokens`` counts as "stop".
        logprobs: None, or how many of the likeliest tokens to report for each place.
        echo: begin with the prompt.

    Raises:
        InputError: logprobs of the prompt, whose logits a model opened without logits_all does not keep.
    """
    base = {
        "id": f"cmpl-{uuid.uuid4()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    text = TextStream(stop)
    scored = None if logprobs is None else Logprobs(logprobs, lambda token: llm.detokenize([token]))
    if scored is not None and echo and not llm._logits_all:
        raise InputError("logprobs of the prompt (echo) need a model opened with logits_all=True")
    asked = prompt if isinstance(prompt, str) else _text(llm.detokenize(list(prompt)))

    def chunk(shown: str, values: dict[str, list] | None, reason: str | None) -> dict[str, Any]:
        return {**base, "choices": [{"text": shown, "index": 0, "logprobs": values, "finish_reason": reason}]}

    generated: list[int] = []
    parts: list[str] = []
    merged: dict[str, list] = {}
    reason = None
    for shown, reason in _pieces(llm, tokens, steps, generated, max_tokens, text, scored, len(asked)):
        values = None
        if echo and not parts:
            shown = asked + shown
            if scored is not None:
                _score_prompt(llm, scored, tokens, asked, isinstance(prompt, str))
        if scored is not None:
            whole = reason is not None and text.n_shown == text.n_read
            values = completion_logprobs(scored.take(None if whole else len(asked) + text.n_shown))
        parts.append(shown)
        if stream and (shown or values):
            yield chunk(shown, values, None)
        for name, column in (values or {}).items():
            merged.setdefault(name, []).extend(column)
    if stream:
        yield chunk("", None, reason)
        return
    usage = {
        "prompt_tokens": len(tokens),
        "completion_tokens": len(generated),
        "total_tokens": len(tokens) + len(generated),
    }
    yield {**chunk("".join(parts), merged or None, reason), "usage": usage}
