"""Remaining channels: those of the dense network that have not been removed.

Masks, scores and the history are over the channels of the dense network, from the first check to
the last.  The network itself loses channels in stages; what freezes its slices counts those that it
still has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..search.mask import Mask
from .channel_groups import Groups

__all__ = ["RemainingChannels"]


class RemainingChannels:
    """Which channels the network still has, and where.

    Args:
        groups: of the dense network.

    Attributes:
        groups: of the network as it is now.
        removed: bool ``[num_channels of the dense network]``.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.removed = torch.zeros(groups.num_channels, dtype=torch.bool)

    @property
    def num_removed(self) -> int:
        return int(self.removed.sum())

    def of(self, dense: Tensor) -> Tensor:
        """Values for every channel of the dense network: those of the channels left."""
        return dense[~self.removed]

    def mask_of(self, dense: Mask) -> Mask:
        """A mask over the dense network's channels as one over the channels left."""
        return Mask.from_vector(self.groups.sizes, self.of(dense.keep))

    def numbers(self, channels: Tensor) -> Tensor:
        """int64: the numbers, among those left, of channels counted in the dense network."""
        return ((~self.removed).cumsum(0) - 1)[channels]

    def in_dense(self, flags: Tensor) -> Tensor:
        """Flags of the channels left as flags of all channels of the dense network; what has been
        removed is True."""
        dense = self.removed.clone()
        dense[~self.removed] = flags
        return dense

    def remove(self, dense: Mask) -> None:
        """What a mask over the dense network's channels drops has been removed."""
        self.groups = self.groups.left_by(self.mask_of(dense))
        self.removed = ~dense.keep
