"""Memory that a process has allocated and not freed: the resident size also holds what glibc keeps back for later."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def _mallinfo() -> Any:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    return mallinfo2()


def in_use() -> int:
    """Bytes from malloc in all threads' arenas and mapped singly; Python's small objects have arenas of their own."""
    found = _mallinfo()
    return found.uordblks + found.hblkhd


def mapped(make: Callable[[], Any]) -> int:
    """Bytes that are mapped singly for what ``make`` returns."""
    before = _mallinfo().hblkhd
    made = make()
    after = _mallinfo().hblkhd
    del made
    return after - before
