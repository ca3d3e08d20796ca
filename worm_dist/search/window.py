"""Window: the last l masks, and how far the newest is from each older one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from .mask import Mask

__all__ = ["Window"]


class Window:
    """The newest ``length`` masks.

    A mask is settled when the window is full and every distance of its newest mask to an older
    one is below the threshold (Early-Bird, arXiv 1909.11957, section 4).
    """

    def __init__(self, length: int, masks: Iterable[Mask] = ()) -> None:
        self._masks: deque[Mask] = deque(masks, maxlen=length)
        self._length = length

    def push(self, mask: Mask) -> None:
        self._masks.append(mask)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """Oldest first."""
        return tuple(self._masks)

    @property
    def full(self) -> bool:
        return len(self._masks) == self._length

    @property
    def distances(self) -> tuple[float, ...]:
        """Of the newest mask to each older one, oldest first; empty before the second mask."""
        if not self._masks:
            return ()
        *older, newest = self._masks
        return tuple(newest.distance(mask) for mask in older)

    def settled(self, threshold: float) -> bool:
        return self.full and max(self.distances) < threshold
