"""Window: the newest masks, and the distances of the newest one to the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..groups.mask import Mask

__all__ = ["Window"]


class Window:
    """The newest ``length`` masks.

    The newest mask is settled when the window is full and its distance to every older mask is below
    the threshold (Early-Bird, arXiv 1909.11957, section 4).

    Args:
        length: the number of masks in a full window.
        masks: the initial masks, oldest first.
    """

    def __init__(self, length: int, masks: Iterable[Mask] = ()) -> None:
        self._masks: deque[Mask] = deque(masks, maxlen=length)
        self._length = length

    def push(self, mask: Mask) -> None:
        self._masks.append(mask)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks, oldest first."""
        return tuple(self._masks)

    @property
    def full(self) -> bool:
        return len(self._masks) == self._length

    @property
    def distances(self) -> tuple[float, ...]:
        """The distances of the newest mask to the older ones, oldest first, 0 to 1; empty before
        the second mask."""
        if not self._masks:
            return ()
        *older, newest = self._masks
        return tuple(newest.distance(mask) for mask in older)

    def settled(self, threshold: float) -> bool:
        return self.full and max(self.distances) < threshold
