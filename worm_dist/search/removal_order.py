"""Removal order: the order in which dropped channels are removed."""

from __future__ import annotations

from torch import Tensor

__all__ = ["removal_order"]


def removal_order(dropped: Tensor, checks_dropped: Tensor, importance: Tensor) -> Tensor:
    """Sort dropped channels: longest dropped first (the static groups of WORM, PMLR 262:232-240),
    then least important, then by group and channel.

    The order is total, so all ranks agree.

    Args:
        dropped: bool ``[num_channels]``, the channels to remove.
        checks_dropped: int64 ``[num_channels]``, the number of consecutive checks, up to the last
            one, whose masks dropped the channel.
        importance: float ``[num_channels]``, the score of every channel.

    Returns:
        The indices of the channels to remove, int64, first to be removed first.
    """
    # Stable sorts, last key first; the indices are in order of group and channel already.
    channels = dropped.nonzero().flatten()
    channels = channels[importance.cpu()[channels].argsort(stable=True)]
    return channels[checks_dropped[channels].argsort(descending=True, stable=True)]
