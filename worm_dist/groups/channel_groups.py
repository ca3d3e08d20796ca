"""Channel groups: the parameter slices that are kept or removed together.

For a network ``conv -> norm -> relu -> next`` the group of the conv is

    channel c = filter c of conv, scale c and shift c of norm, input column(s) c of next

and residual sums tie the filters of several convs into one group.  An attention head is a channel
too: its rows of query, key and value, its gate, and the columns that read it.  All indices refer to
the unpruned network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..digest import digest_of
from .mask import Mask

__all__ = ["ChannelGroup", "Groups", "Member"]


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one module in a group.

    Attributes:
        module: the module's name in the unwrapped network.
        role: ``producer`` (its outputs are the channels), ``norm``, ``gate`` (a factor for each
            channel), or ``consumer`` (its inputs are the channels).
        positions: int64 ``[channels, k]``: the indices of each channel along the sliced dimension;
            k > 1 behind a flatten, in attention heads and in grouped convolutions.
        parameters: the sliced parameters: (name, sliced dimension).
    """

    module: str
    role: Literal["producer", "norm", "gate", "consumer"]
    positions: Tensor
    parameters: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        assert self.positions.dim() == 2 and self.positions.dtype == torch.int64, self.module
        assert self.positions.unique().numel() == self.positions.numel(), self.module


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can be kept or dropped independently, each with all its slices.

    Attributes:
        name: the name of the first module that produces the channels; that of a selective norm if
            the channels are those that it has selected.
        num_channels: the number of channels.
        members: the modules that hold slices of the channels, in network order.
        tied: whether a sum (residual connection) couples the outputs of several layers.
    """

    name: str
    num_channels: int
    members: tuple[Member, ...]
    tied: bool = False

    def __post_init__(self) -> None:
        roles = {member.role for member in self.members}
        assert "consumer" in roles and roles & {"producer", "norm"}, self.name
        for member in self.members:
            assert member.positions.shape[0] == self.num_channels, (self.name, member.module)

    @property
    def norms(self) -> tuple[Member, ...]:
        return self._with_role("norm")

    @property
    def gates(self) -> tuple[Member, ...]:
        return self._with_role("gate")

    @property
    def consumers(self) -> tuple[Member, ...]:
        return self._with_role("consumer")

    @property
    def zeroing_members(self) -> tuple[Member, ...]:
        """The members to set to zero so that a channel becomes zero: its norms' scales and shifts,
        or else its gate, or else the layers that produce it."""
        return self.norms or self.gates or self._with_role("producer")

    def _with_role(self, role: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == role)


class Groups(Sequence[ChannelGroup]):
    """All channel groups of a network, in network order.

    Attributes:
        dense: by module name, the reason why a norm (or a layer without norm) is in no group.
    """

    def __init__(self, groups: Sequence[ChannelGroup], dense: Mapping[str, str]) -> None:
        self._groups = tuple(groups)
        self.dense = dict(dense)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of channels of each group."""
        return {group.name: group.num_channels for group in self._groups}

    @property
    def widths(self) -> dict[str, int]:
        """The number of indices that one channel of each group takes in its norm or layer."""
        return {group.name: group.zeroing_members[0].positions.shape[1] for group in self._groups}

    @property
    def num_channels(self) -> int:
        return sum(self.sizes.values())

    @property
    def norm_scales(self) -> set[str]:
        """The names of the norms' scales."""
        return {norm.parameters[0][0] for group in self._groups for norm in group.norms}

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector ``[num_channels]`` over all channels by group."""
        sizes = self.sizes
        return dict(zip(sizes, vector.split(list(sizes.values())), strict=True))

    def without(self, reasons: Mapping[str, str]) -> Groups:
        """Return the groups without those in ``reasons``, which stay dense for these reasons."""
        left = {
            name: reasons[group.name]
            for group in self._groups
            if group.name in reasons
            for name in [norm.module for norm in group.norms] or [group.name]
        }
        rest = [group for group in self._groups if group.name not in reasons]
        return Groups(rest, self.dense | left)

    def after_removing(self, mask: Mask) -> Groups:
        """Return the groups of the network from which the dropped channels have been removed: the
        same members, with renumbered positions.

        Args:
            mask: a mask over these groups that keeps at least one channel of each.
        """
        gone: dict[tuple[str, int], list[Tensor]] = {}
        for group in self._groups:
            for member in group.members:
                indices = member.positions[~mask[group.name]].flatten()
                for parameter in member.parameters:
                    gone.setdefault(parameter, []).append(indices)
        removed = {parameter: torch.cat(indices).unique() for parameter, indices in gone.items()}
        return Groups([_reduced(group, mask[group.name], removed) for group in self], self.dense)

    @property
    def digests(self) -> dict[str, bytes]:
        """The digest of each group's structure: equal if and only if the slices are the same."""
        return {
            group.name: digest_of(
                [group.tied, [(m.module, m.role, m.parameters, m.positions) for m in group.members]]
            )
            for group in self._groups
        }

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)


def _reduced(
    group: ChannelGroup, kept: Tensor, removed: Mapping[tuple[str, int], Tensor]
) -> ChannelGroup:
    """Return a group without its dropped channels.

    Args:
        group: the group before removal.
        kept: bool ``[channels]``, True = kept.
        removed: by (parameter, dimension), the removed indices in ascending order.
    """
    members = []
    for member in group.members:
        indices = member.positions[kept]
        shifts = torch.searchsorted(removed[member.parameters[0]], indices)
        members.append(dataclasses.replace(member, positions=indices - shifts))
    return dataclasses.replace(group, num_channels=int(kept.sum()), members=tuple(members))
