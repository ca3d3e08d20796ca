"""Scale index: the indices of each channel's scales among all scales of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..groups.channel_groups import Groups
from ..groups.full_shape import full_numel

__all__ = ["FullValues", "ScaleIndex", "detached"]

FullValues = Callable[[Sequence[Tensor]], list[Tensor]]
"""A function that returns the full values of parameters, detached; collective if these are
sharded."""


def detached(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The values of parameters that every rank holds in full."""
    return [parameter.detach() for parameter in parameters]


class ScaleIndex:
    """The concatenated scales of norms and gates, and the indices of each channel's scales.

    Only scales that belong to a channel count; a norm after a concatenation may have others.

    Args:
        network: the unwrapped network.
        groups: the network's channel groups, each with norms or gates.
        full_values: returns the full values of parameters, detached; see
            ``Backend.full_values``.

    Attributes:
        scales: the scale parameters, each once.
        counts: the number of scales that belong to channels, by norm name, or by group name for
            gates.
        indices_TN: int64 ``[T, num_channels]``, indices into ``magnitudes()``; T is the largest
            number of scales of a channel, channels with fewer are padded.
        present_TN: bool of the same shape, False in the padding.
        shares_TN: float32 of the same shape, 1/n for each of the n scales of a channel.
    """

    def __init__(
        self, network: nn.Module, groups: Groups, full_values: FullValues = detached
    ) -> None:
        self._full_values = full_values
        parameters = dict(network.named_parameters())
        members = [(n, member) for n, g in enumerate(groups) for member in g.norms + g.gates]
        names = [group.name for group in groups]
        counted: dict[str, Tensor] = {}
        owners: dict[str, str] = {}
        for number, member in members:
            name = member.parameters[0][0]
            owners[name] = member.module if member.role == "norm" else names[number]
            used = counted.setdefault(
                name, torch.zeros(full_numel(parameters[name]), dtype=torch.bool)
            )
            used[member.positions.flatten()] = True
        self.scales = [parameters[name] for name in counted]
        self._names = tuple(counted)
        self._sizes = {name: used.numel() for name, used in counted.items()}
        self.device = self.scales[0].device
        self.counts = {owners[name]: int(used.sum()) for name, used in counted.items()}
        starts: dict[str, int] = {}
        start = 0
        for name, used in counted.items():
            starts[name] = start
            start += int(used.sum())
        columns: list[list[Tensor]] = [[] for _ in groups]
        for number, member in members:
            name = member.parameters[0][0]
            indices = counted[name].cumsum(0) - 1 + starts[name]
            columns[number].append(indices[member.positions])
        self._fill([torch.cat(column, dim=1) for column in columns])
        self._counted = [used.nonzero().flatten().to(self.device) for used in counted.values()]

    def _fill(self, columns: list[Tensor]) -> None:
        most = max(column.shape[1] for column in columns)
        num_channels = sum(len(column) for column in columns)
        indices_TN = torch.zeros(most, num_channels, dtype=torch.int64)
        shares_TN = torch.zeros(most, num_channels)
        first = 0
        for column in columns:
            here, num_scales = column.shape
            indices_TN[:num_scales, first : first + here] = column.t()
            shares_TN[:num_scales, first : first + here] = 1 / num_scales
            first += here
        self.indices_TN = indices_TN.to(self.device)
        self.shares_TN = shares_TN.to(self.device)
        self.present_TN = self.shares_TN > 0

    def values(self) -> Tensor:
        """Return all scales that belong to channels, float32 ``[scales]``."""
        values = zip(self._full_values(self.scales), self._counted, strict=True)
        return torch.cat([value.float()[at] for value, at in values])

    def magnitudes(self) -> Tensor:
        """Return their magnitudes, float32 ``[scales]``."""
        return self.values().abs_()

    def flags_by_name(self, flags: Tensor) -> dict[str, Tensor]:
        """Split flags of all scales that belong to channels, bool ``[scales]``, by parameter.

        Returns:
            By name of a scale parameter, a bool tensor ``[elements]`` on the CPU; False for
            elements that belong to no channel.
        """
        by_name = {}
        parts = flags.split(list(self.counts.values()))
        for name, at, here in zip(self._names, self._counted, parts, strict=True):
            by_name[name] = torch.zeros(self._sizes[name], dtype=torch.bool)
            by_name[name][at.cpu()] = here
        return by_name
