"""Index: where among all scales of a network those of each channel are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..groups.channel_groups import Groups

__all__ = ["ScaleIndex"]


class ScaleIndex:
    """The scales of norms and gates, side by side, and the places of each channel among them.

    Only scales that belong to a channel count; a norm behind a concatenation may have others.

    Attributes:
        scales: the parameters, each once.
        counts: how many scales belong to channels, by the name of their norm; those of a gate by
            the name of its group.
        places_TN: int64 ``[T, num_channels]``, places in ``sizes()``; T is the largest number of
            scales that a channel has, a channel that has fewer is padded.
        present_TN: bool of the same shape, False where it is padded.
        shares_TN: float32 of the same shape: of the n scales of a channel each has the share 1/n.
    """

    def __init__(self, network: nn.Module, groups: Groups) -> None:
        parameters = dict(network.named_parameters())
        members = [(n, member) for n, g in enumerate(groups) for member in g.norms + g.gates]
        names = [group.name for group in groups]
        counted: dict[str, Tensor] = {}
        owners: dict[str, str] = {}
        for number, member in members:
            name = member.parameters[0][0]
            owners[name] = member.module if member.role == "norm" else names[number]
            mine = counted.setdefault(name, torch.zeros(parameters[name].numel(), dtype=torch.bool))
            mine[member.positions.flatten()] = True
        self.scales = [parameters[name] for name in counted]
        self.device = self.scales[0].device
        self.counts = {owners[name]: int(mine.sum()) for name, mine in counted.items()}
        starts: dict[str, int] = {}
        start = 0
        for name, mine in counted.items():
            starts[name] = start
            start += int(mine.sum())
        columns: list[list[Tensor]] = [[] for _ in groups]
        for number, member in members:
            name = member.parameters[0][0]
            places = counted[name].cumsum(0) - 1 + starts[name]
            columns[number].append(places[member.positions])
        self._fill([torch.cat(column, dim=1) for column in columns])
        self._counted = [mine.nonzero().flatten().to(self.device) for mine in counted.values()]

    def _fill(self, columns: list[Tensor]) -> None:
        most = max(column.shape[1] for column in columns)
        num_channels = sum(len(column) for column in columns)
        places_TN = torch.zeros(most, num_channels, dtype=torch.int64)
        shares_TN = torch.zeros(most, num_channels)
        first = 0
        for column in columns:
            here, num_scales = column.shape
            places_TN[:num_scales, first : first + here] = column.t()
            shares_TN[:num_scales, first : first + here] = 1 / num_scales
            first += here
        self.places_TN = places_TN.to(self.device)
        self.shares_TN = shares_TN.to(self.device)
        self.present_TN = self.shares_TN > 0

    def sizes(self) -> Tensor:
        """float32 ``[scales]``: the size of every scale that belongs to a channel."""
        scales = zip(self.scales, self._counted, strict=True)
        return torch.cat([scale.detach().float()[at] for scale, at in scales]).abs_()
