"""Which layers to leave out where no router decides."""

from __future__ import annotations

from collections.abc import Sequence


def evenly(layers: Sequence[int], count: int) -> list[int]:
    """``count`` of the ``layers``, at equal distances and as far from both ends."""
    return [layers[int((i + 0.5) * len(layers) / count)] for i in range(count)]
