"""Completions from a FirstLlama, whole or streamed.

llama_cpp.Llama's own streaming loses what follows an invalid byte, can run past max_tokens in the middle of a
character, and cuts at the first stop string of the list instead of the first in the text; here one loop makes both
forms, so that the pieces of a stream always add up to the whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfirst.errors import InputError
from pyfirst.text import TextStream

if TYPE_CHECKING:
    from pyfirst.llama import FirstLlama


class _Logprobs:
    """Log-probabilities of tokens, let go once the text of their token is shown.

    Args:
        llm: for token texts.
        top: how many of the likeliest tokens to report beside the one that came.
    """

    def __init__(self, llm: FirstLlama, top: int):
        if top < 0:
            raise InputError(f"logprobs is {top}, expected 0 or more")
        self.llm, self.top = llm, top
        self._entries: list[tuple[int, str, float | None, dict[str, float] | None]] = []

    def _text(self, token: int) -> str:
        return self.llm.detokenize([token]).decode("utf-8", "ignore")

    def add(self, token: int, offset: int, logits: np.ndarray | None) -> None:
        """A token whose text begins at character ``offset``; logits [n_vocab] are None where nothing came before."""
        if logits is None:
            self._entries.append((offset, self._text(token), None, None))
            return
        values = self.llm.logits_to_logprobs(logits)
        best = np.argsort(-values, kind="stable")[: self.top]
        top = {self._text(int(i)): float(values[i]) for i in best[::-1]}
        top[self._text(token)] = float(values[token])
        self._entries.append((offset, self._text(token), float(values[token]), top))

    def prepend(self, tokens: list[int]) -> None:
        """The prompt's tokens, without BOS as in its text; the first has nothing to be compared with."""
        later, self._entries = self._entries, []
        first, offset = int(tokens[0] == self.llm.token_bos()), 0
        for i in range(first, len(tokens)):
            self.add(tokens[i], offset, self.llm.logits_of(i - 1) if i > first else None)
            text = self.llm.detokenize(tokens[first : i + 1]).decode("utf-8", "ignore")
            offset = len(text)
        self._entries += later

    def take(self, n_shown: int | None = None) -> dict[str, list] | None:
        """Entries of tokens whose text begins before character ``n_shown``, or all; None if there are none."""
        n = sum(n_shown is None or entry[0] < n_shown for entry in self._entries)
        taken, self._entries = self._entries[:n], self._entries[n:]
        if not taken:
            return None
        names = ("text_offset", "tokens", "token_logprobs", "top_logprobs")
        return {name: list(column) for name, column in zip(names, zip(*taken, strict=True), strict=True)}


def _pieces(
    llm: FirstLlama,
    tokens: list[int],
    steps: Iterable[int],
    generated: list[int],
    max_tokens: int,
    text: TextStream,
    scored: _Logprobs | None,
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
    scored = None if logprobs is None else _Logprobs(llm, logprobs)
    if scored is not None and echo and not llm._logits_all:
        raise InputError("logprobs of the prompt (echo) need a model opened with logits_all=True")
    asked = prompt if isinstance(prompt, str) else llm.detokenize(list(prompt)).decode("utf-8", "ignore")

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
                scored.prepend(tokens)
        if scored is not None:
            whole = reason is not None and text.n_shown == text.n_read
            values = scored.take(None if whole else len(asked) + text.n_shown)
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
