"""Channel groups: the slices of parameters that live and die together.

For a network ``conv -> norm -> relu -> next`` the group of the conv is

    channel c = filter c of conv, scale c and shift c of norm, input column(s) c of next

and residual sums tie the filters of several convs into one group.  A head of an attention is a
channel too: its rows of query, key and value, its gate, and the columns that read it.  All indices
are those of the whole, unpruned network.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..search.mask import Mask

__all__ = ["ChannelGroup", "Groups", "Member"]


@dataclass(frozen=True, eq=False)
class Member:
    """The part that one module has in a group.

    Attributes:
        module: its name in the unwrapped network.
        role: ``producer`` (its outputs are the channels), ``norm``, ``gate`` (a factor for each
            channel), or ``consumer`` (its inputs).
        positions: int64 ``[channels, k]``: the places along that dimension of the parameters that
            each channel takes; k > 1 behind a flatten, in heads and in grouped convolutions.
        parameters: the sliced parameters, each with the dimension it is sliced along.
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
    """Channels that are kept or dropped one by one, each with all its slices.

    Attributes:
        name: of the first module that produces the channels.
        num_channels: how many channels.
        members: every module that holds slices, in the network's order.
        tied: whether a sum ties the outputs of several layers to one another.
    """

    name: str
    num_channels: int
    members: tuple[Member, ...]
    tied: bool = False

    def __post_init__(self) -> None:
        assert {"producer", "consumer"} <= {member.role for member in self.members}, self.name
        for member in self.members:
            assert member.positions.shape[0] == self.num_channels, (self.name, member.module)

    @property
    def norms(self) -> tuple[Member, ...]:
        return self._having("norm")

    @property
    def gates(self) -> tuple[Member, ...]:
        return self._having("gate")

    @property
    def consumers(self) -> tuple[Member, ...]:
        return self._having("consumer")

    @property
    def silencers(self) -> tuple[Member, ...]:
        """The members whose zeros make a channel zero: its norms' scales and shifts, or its gate;
        where there is neither, the layers that produce it."""
        return self.norms or self.gates or self._having("producer")

    def _having(self, role: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == role)


class Groups(Sequence[ChannelGroup]):
    """All channel groups of a network, in the network's order.

    Attributes:
        dense: for each norm, or module without one, that is in no group, why it is left dense.
    """

    def __init__(self, groups: Sequence[ChannelGroup], dense: Mapping[str, str]) -> None:
        self._groups = tuple(groups)
        self.dense = dict(dense)

    @property
    def sizes(self) -> dict[str, int]:
        """Channels of each group."""
        return {group.name: group.num_channels for group in self._groups}

    @property
    def widths(self) -> dict[str, int]:
        """How many places in a norm or a layer each channel of a group takes."""
        return {group.name: group.silencers[0].positions.shape[1] for group in self._groups}

    @property
    def num_channels(self) -> int:
        return sum(self.sizes.values())

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector ``[num_channels]`` over all channels, group by group."""
        sizes = self.sizes
        return dict(zip(sizes, vector.split(list(sizes.values())), strict=True))

    def without(self, reasons: Mapping[str, str]) -> Groups:
        """The same, but the groups named are left dense for these reasons."""
        left = {
            name: reasons[group.name]
            for group in self._groups
            if group.name in reasons
            for name in [norm.module for norm in group.norms] or [group.name]
        }
        rest = [group for group in self._groups if group.name not in reasons]
        return Groups(rest, self.dense | left)

    def left_by(self, mask: Mask) -> Groups:
        """The groups of the network that is left when the channels which a mask drops have been
        removed: the same members, their places counted anew.

        Args:
            mask: of these groups; it keeps a channel of each.
        """
        gone: dict[tuple[str, int], list[Tensor]] = {}
        for group in self._groups:
            for member in group.members:
                places = member.positions[~mask[group.name]].flatten()
                for parameter in member.parameters:
                    gone.setdefault(parameter, []).append(places)
        removed = {parameter: torch.cat(places).unique() for parameter, places in gone.items()}
        return Groups([_left(group, mask[group.name], removed) for group in self], self.dense)

    @property
    def digests(self) -> dict[str, bytes]:
        """The structure of each group: equal if and only if ranks mean the same slices."""
        digests = {}
        for group in self._groups:
            structure = hashlib.blake2b(repr(group.tied).encode(), digest_size=16)
            for member in group.members:
                structure.update(repr((member.module, member.role, member.parameters)).encode())
                structure.update(member.positions.numpy().tobytes())
            digests[group.name] = structure.digest()
        return digests

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)


def _left(
    group: ChannelGroup, kept: Tensor, removed: Mapping[tuple[str, int], Tensor]
) -> ChannelGroup:
    """A group without the channels that are not kept.

    Args:
        removed: of every sliced dimension of a parameter, the places that go, ascending.
    """
    members = []
    for member in group.members:
        places = member.positions[kept]
        shifts = torch.searchsorted(removed[member.parameters[0]], places)
        members.append(dataclasses.replace(member, positions=places - shifts))
    return dataclasses.replace(group, num_channels=int(kept.sum()), members=tuple(members))
