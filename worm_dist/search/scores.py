"""Scores: how much each channel matters, one float a channel."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from .groups import Groups

__all__ = ["NormScale"]


class NormScale:
    """The size of the normalisation scale, |gamma|, averaged over the coupled norms of a group.

    Source: Network Slimming (arXiv 1708.06519, section 3) and Early-Bird (arXiv 1909.11957).

    Attributes:
        scales: of all groups' norms.
    """

    # S: scales of all norms in one vector      N: channels of all groups
    # T: most scales that any one channel has; a channel that has fewer is padded with share 0

    def __init__(self, network: nn.Module, groups: Groups) -> None:
        parameters = dict(network.named_parameters())
        self.scales: list[nn.Parameter] = []
        columns: list[Tensor] = []
        start = 0
        for group in groups:
            places = []
            for norm in group.norms:
                scale = parameters[norm.parameters[0][0]]
                places.append(norm.positions + start)
                self.scales.append(scale)
                start += scale.numel()
            columns.append(torch.cat(places, dim=1))
        most = max(column.shape[1] for column in columns)
        device = self.scales[0].device
        places_TN = torch.zeros(most, groups.num_channels, dtype=torch.int64)
        shares_TN = torch.zeros(most, groups.num_channels)
        first = 0
        for column in columns:
            num_channels, num_scales = column.shape
            span = slice(first, first + num_channels)
            places_TN[:num_scales, span] = column.t()
            shares_TN[:num_scales, span] = 1 / num_scales
            first += num_channels
        self._places_TN = places_TN.to(device)
        self._shares_TN = shares_TN.to(device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """float32 ``[num_channels]`` on the network's device, in the order of the groups.

        A gather and an ordered sum, no scatter-add: the same bits on every device of a kind.
        """
        sizes_S = torch.cat([scale.detach().float() for scale in self.scales]).abs_()
        return (sizes_S[self._places_TN] * self._shares_TN).sum(dim=0)

    def penalty(self, used: Container[nn.Parameter] | None = None) -> Tensor:
        """The L1 norm of all scales, or of those in use; a differentiable scalar."""
        scales = [scale.float() for scale in self.scales if used is None or scale in used]
        return torch.cat(scales).abs().sum() if scales else self.scales[0].new_zeros(())
