"""Channel groups: the slices of parameters that live and die together.

For a network ``conv -> norm -> relu -> next`` the group of the conv is

    channel c = filter c of conv, scale c and shift c of norm, input column(s) c of next

and residual sums tie the filters of several convs into one group.  All indices are those of the
whole, unpruned network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

__all__ = ["ChannelGroup", "Groups", "Member"]


@dataclass(frozen=True, eq=False)
class Member:
    """The part that one module has in a group.

    Attributes:
        module: its name in the unwrapped network.
        role: ``producer`` (its outputs are the channels), ``norm``, or ``consumer`` (its inputs).
        positions: int64 ``[channels, k]``: the places along that side of the module that each
            channel takes; k > 1 behind a flatten.
        parameters: the sliced parameters, each with the dimension it is sliced along.
    """

    module: str
    role: Literal["producer", "norm", "consumer"]
    positions: Tensor
    parameters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are kept or dropped one by one, each with all its slices.

    Attributes:
        name: of the first module that produces the channels.
        num_channels: how many channels.
        members: every module that holds slices, in the network's order.
    """

    name: str
    num_channels: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        roles = {member.role for member in self.members}
        assert {"producer", "norm"} <= roles, self.name
        for member in self.members:
            assert member.positions.shape[0] == self.num_channels, (self.name, member.module)

    @property
    def norms(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "norm")

    @property
    def consumers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "consumer")


class Groups(Sequence[ChannelGroup]):
    """All channel groups of a network, in the network's order.

    Attributes:
        dense: for each norm that is in no group, why it is left dense.
    """

    def __init__(self, groups: Sequence[ChannelGroup], dense: Mapping[str, str]) -> None:
        self._groups = tuple(groups)
        self.dense = dict(dense)

    @property
    def sizes(self) -> dict[str, int]:
        """Channels of each group."""
        return {group.name: group.num_channels for group in self._groups}

    @property
    def num_channels(self) -> int:
        return sum(self.sizes.values())

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector ``[num_channels]`` over all channels, group by group."""
        sizes = self.sizes
        return dict(zip(sizes, vector.split(list(sizes.values())), strict=True))

    def without(self, reasons: Mapping[str, str]) -> Groups:
        """The same, but the groups named are left dense for these reasons."""
        norms = {
            norm.module: reasons[group.name]
            for group in self._groups
            if group.name in reasons
            for norm in group.norms
        }
        rest = [group for group in self._groups if group.name not in reasons]
        return Groups(rest, self.dense | norms)

    @property
    def digests(self) -> dict[str, bytes]:
        """The structure of each group: equal if and only if ranks mean the same slices."""
        digests = {}
        for group in self._groups:
            structure = hashlib.blake2b(digest_size=16)
            for member in group.members:
                structure.update(repr((member.module, member.role, member.parameters)).encode())
                structure.update(member.positions.numpy().tobytes())
            digests[group.name] = structure.digest()
        return digests

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)
