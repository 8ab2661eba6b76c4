"""Progress bars on stderr, with bytes and the time left; none where stderr is no terminal."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def bar(what: str, total: int) -> Any:
    """A tqdm bar over ``total`` bytes, gone when it is closed."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None)
