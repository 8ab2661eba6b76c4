"""Tokens to text as it comes: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of tokens into text that may be shown.

    The text does not depend on how the bytes are cut into tokens. Bytes that are not UTF-8 are left out, as
    llama_cpp.Llama leaves them out; of a character that is cut off at the end nothing is shown.

    Attributes:
        stop: strings that end the text, empty ones left out.
        n_shown: characters shown so far.
        n_read: characters read so far, those included that are held back.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stop = [s for s in stop if s]
        self.n_shown = self.n_read = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._held = ""

    def feed(self, piece: bytes) -> tuple[str, bool]:
        """(text to show, whether a stop string was met)."""
        text = self._decoder.decode(piece)
        self.n_read += len(text)
        self._held += text
        hits = [(start + len(s), start) for s in self.stop if (start := self._held.find(s)) >= 0]
        if hits:
            # The one that is complete first, as if the characters came one by one.
            return self._show(min(hits)[1]), True
        keep = max((self._partial(s) for s in self.stop), default=0)
        return self._show(len(self._held) - keep), False

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        return self._show(len(self._held))

    def _partial(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _show(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        self.n_shown += n
        return text
