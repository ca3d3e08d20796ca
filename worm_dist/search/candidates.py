"""Candidates: what is ranked, and which channels a mask over it means.

Usually each channel is a candidate.  Ranked norm by norm, as Early-Bird does, the candidates are
the scales of every norm; a channel that several norms scale is several candidates then.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .mask import Mask

__all__ = ["Candidates", "NormCandidates"]


class Candidates:
    """Every channel is one.

    Attributes:
        sizes: candidates of each group, or of each norm, in the order of the scores.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)

    @property
    def number(self) -> int:
        return sum(self.sizes.values())

    def flags(self, channels: Tensor) -> Tensor:
        """Of flags for all channels, bool ``[num_channels]``, those of the candidates."""
        return channels

    def mask(self, kept: Mask) -> Mask:
        """The mask over the groups' channels that a mask over candidates means."""
        return kept

    def importance(self, scores: Tensor) -> Tensor:
        """Of scores of the candidates, on the CPU, one for each channel: ``[num_channels]``."""
        return scores


class NormCandidates(Candidates):
    """The scales of every norm by itself; a channel is dropped only where all its norms drop it.

    Source: Early-Bird (arXiv 1909.11957), whose masks are those of the single norms.

    Args:
        sizes: scales of each norm.
        channels: of each group.
        indices_TN: int64 ``[T, num_channels]`` on the CPU, the scales of every channel, padded.
        present_TN: bool of the same shape, False where it is padded.
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
        return scores[self._indices_TN].masked_fill(~self._present_TN, 0).amax(dim=0)
