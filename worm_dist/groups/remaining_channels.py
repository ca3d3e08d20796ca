"""Remaining channels: the channels of the dense network that have not been removed.

Masks, scores and the history always cover the channels of the dense network.  The network itself
loses channels in stages, and slices are frozen by the indices of the channels that remain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .channel_groups import Groups
from .mask import Mask

__all__ = ["RemainingChannels"]


class RemainingChannels:
    """The channels that the network still has, and their indices.

    Args:
        groups: the channel groups of the dense network.

    Attributes:
        groups: the channel groups of the current network.
        removed: bool ``[num_channels of the dense network]``, True = removed.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.removed = torch.zeros(groups.num_channels, dtype=torch.bool)

    @property
    def num_removed(self) -> int:
        return int(self.removed.sum())

    def of(self, dense: Tensor) -> Tensor:
        """Select the values of the remaining channels from values for the dense network."""
        return dense[~self.removed]

    def mask_of(self, dense: Mask) -> Mask:
        """Convert a mask over the dense network's channels to one over the remaining channels."""
        return Mask.from_vector(self.groups.sizes, self.of(dense.keep))

    def numbers(self, channels: Tensor) -> Tensor:
        """Convert int64 channel indices of the dense network to indices of remaining channels."""
        return ((~self.removed).cumsum(0) - 1)[channels]

    def in_dense(self, flags: Tensor) -> Tensor:
        """Expand flags of remaining channels to the dense network; removed channels are True."""
        dense = self.removed.clone()
        dense[~self.removed] = flags
        return dense

    def remove(self, dense: Mask) -> None:
        """Record that the channels dropped by a mask over the dense network have been removed."""
        self.groups = self.groups.after_removing(self.mask_of(dense))
        self.removed = ~dense.keep
