"""Window: the newest masks, and the distances of the newest one to the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..groups.mask import Mask

__all__ = ["Window"]


class Window:
    """The newest ``length`` masks.

    Args:
        length: the number of masks in a full window.
        masks: the initial masks, oldest first.
    """

    def __init__(self, length: int, masks: Iterable[Mask] = ()) -> None:
        self._masks: deque[Mask] = deque(masks, maxlen=length)

    def push(self, mask: Mask) -> None:
        self._masks.append(mask)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks, oldest first."""
        return tuple(self._masks)

    @property
    def distances(self) -> tuple[float, ...]:
        """The distances of the newest mask to the older ones, oldest first, 0 to 1; empty before
        the second mask."""
        if not self._masks:
            return ()
        *older, newest = self._masks
        return tuple(newest.distance(mask) for mask in older)
