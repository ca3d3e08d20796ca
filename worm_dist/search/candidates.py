"""Candidates: the items that are ranked, and the channel mask that follows from a mask over them.

Usually each channel is a candidate.  If norms are ranked separately, as in Early-Bird, the
candidates are the scales of every norm; a channel with several norms is then several candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..groups.mask import Mask

__all__ = ["Candidates", "NormCandidates"]


class Candidates:
    """Candidates that are the channels themselves.

    Attributes:
        sizes: the number of candidates of each group or norm, in the order of the scores.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)

    @property
    def number(self) -> int:
        return sum(self.sizes.values())

    def flags(self, channels: Tensor) -> Tensor:
        """Convert flags of channels, bool ``[num_channels]``, to flags of candidates."""
        return channels

    def mask(self, kept: Mask) -> Mask:
        """Convert a mask over candidates to a mask over the groups' channels."""
        return kept

    def importance(self, scores: Tensor) -> Tensor:
        """Convert candidate scores, on the CPU, to channel scores ``[num_channels]``."""
        return scores


class NormCandidates(Candidates):
    """Candidates that are the scales of single norms; a channel is dropped if all norms drop it.

    Source: Early-Bird (arXiv 1909.11957), which computes a mask for each norm.

    Args:
        sizes: the number of scales of each norm.
        channels: the number of channels of each group.
        indices_TN: int64 ``[T, num_channels]`` on the CPU, the scale indices of each channel,
            padded to the largest number T of scales per channel.
        present_TN: bool of the same shape, False in the padding.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        channels: Mapping[str, int],
        indices_TN: Tensor,
        present_TN: Tensor,
    ) -> None:
        super().__init__(sizes)
        self._channels = dict(channels)
        self._indices_TN = indices_TN
        self._present_TN = present_TN

    def flags(self, channels: Tensor) -> Tensor:
        flags = torch.zeros(self.number, dtype=torch.bool)
        flags[self._indices_TN[self._present_TN & channels]] = True
        return flags

    def mask(self, kept: Mask) -> Mask:
        keep = (kept.keep[self._indices_TN] & self._present_TN).any(dim=0)
        return Mask.from_vector(self._channels, keep)

    def importance(self, scores: Tensor) -> Tensor:
        return scores[self._indices_TN].masked_fill(~self._present_TN, -torch.inf).amax(dim=0)
