"""Removal order: which of the dropped channels leave first."""

from __future__ import annotations

from torch import Tensor

__all__ = ["removal_order"]


def removal_order(dropped: Tensor, checks_dropped: Tensor, importance: Tensor) -> Tensor:
    """Longest dropped first (the static groups of WORM, PMLR 262:232-240), then the least
    important, then by group and channel: a total order, so that no two ranks can differ.

    Args:
        dropped: bool ``[num_channels]``, the channels that are to leave.
        checks_dropped: int64 ``[num_channels]``, checks in a row whose masks dropped a channel.
        importance: float ``[num_channels]``.

    Returns:
        int64 ``[channels that are to leave]``, the first to leave first.
    """
    # Stable sorts by the last key first; channels come in order of group and channel.
    channels = dropped.nonzero().flatten()
    channels = channels[importance.cpu()[channels].argsort(stable=True)]
    return channels[checks_dropped[channels].argsort(descending=True, stable=True)]
