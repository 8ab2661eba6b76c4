"""TextStream: the text shown does not depend on how its bytes were cut."""

from __future__ import annotations

import itertools

import pytest

from pyfirst.text import TextStream

TEXT = "abÄ日本🙂éDEFGHIJxyz🦙!".encode()
BROKEN = b"a\xff\xf0\x9f\x99b\xe6\x97DEF\x80GHIJ\xc3\xa9\xe6"
STOPS: list[list[str]] = [
    [],
    ["DEFGHIJ"],
    ["🙂"],
    ["本🙂é"],
    ["DEF", "本🙂éDEFGH"],
    ["GHIJ", "DEFGHIJ"],
    ["", "EF", "zz"],
]


def shown(pieces, stop) -> tuple[str, bool]:
    stream, out = TextStream(stop), []
    for piece in pieces:
        text, stopped = stream.feed(piece)
        out.append(text)
        if stopped:
            return "".join(out), True
    return "".join(out) + stream.finish(), False


def expected(raw: bytes, stop) -> tuple[str, bool]:
    """Character by character: the stop string that is complete first ends the text."""
    text = raw.decode("utf-8", "ignore")
    for n in range(1, len(text) + 1):
        ends = [len(s) for s in stop if s and text[:n].endswith(s)]
        if ends:
            return text[: n - max(ends)], True
    return text, False


@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("raw", [TEXT, BROKEN, TEXT + BROKEN], ids=["whole", "broken", "both"])
def test_every_cut_gives_the_same_text(raw, stop):
    truth = expected(raw, stop)
    assert shown([raw], stop) == truth
    assert shown([raw[i : i + 1] for i in range(len(raw))], stop) == truth
    for cuts in itertools.combinations(range(len(raw) + 1), 2):
        pieces = [raw[i:j] for i, j in itertools.pairwise((0, *cuts, len(raw)))]
        assert shown(pieces, stop) == truth


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_nothing_of_a_stop_string_is_shown_and_nothing_else_held_back(stop):
    stream = TextStream(stop)
    out = ""
    for i in range(len(TEXT)):
        text, stopped = stream.feed(TEXT[i : i + 1])
        out += text
        if stopped:
            break
        known = TEXT[: i + 1].decode("utf-8", "ignore")
        assert known.startswith(out)
        # What is held back begins a stop string.
        held = known[len(out) :]
        assert not held or any(s.startswith(held) for s in stop)
    assert not any(s in out for s in stop if s)
