"""Plan: from the frozen channels to the live and the frozen part of every parameter.

A frozen channel freezes its scales, whole rows of its producers and, in scope ``coupled``, whole
columns of its consumers.  So the live part of a parameter is always a block: some of its rows, and
of those some columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from .channel_groups import ChannelGroup, Groups, Member

__all__ = ["Block", "FreezePlan", "Scope"]

Scope = Literal["norm", "producer", "coupled"]


@dataclass(frozen=True, eq=False)
class Block:
    """The live part of one parameter.

    Attributes:
        shape: of the whole parameter.
        live: for every sliced dimension (0 for rows, 1 for columns), the int64 indices that live,
            on the parameter's device; a dimension that is not here lives whole.
        frozen: the same for the indices that are frozen.
        live_shape: shape of the live part; dimensions as in ``shape``.
    """

    shape: torch.Size
    live: Mapping[int, Tensor]
    frozen: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        assert self.live.keys() == self.frozen.keys() <= {0, 1}
        for dim, live in self.live.items():
            assert live.numel() + self.frozen[dim].numel() == self.shape[dim]

    @property
    def live_shape(self) -> tuple[int, ...]:
        return tuple(
            self.live[dim].numel() if dim in self.live else size
            for dim, size in enumerate(self.shape)
        )

    @property
    def num_live(self) -> int:
        """Elements of the live part."""
        return prod(self.live_shape)

    def part(self, begin: int, num_elements: int) -> Block:
        """The block of consecutive elements of the flattened parameter; all of them are a block as
        it is, fewer are one row each."""
        if num_elements == self.shape.numel():
            return self
        device = next(iter(self.live.values())).device
        lives = torch.ones(self.shape, dtype=torch.bool, device=device)
        for dim, frozen in self.frozen.items():
            lives.index_fill_(dim, frozen, False)
        lives = lives.flatten()[begin : begin + num_elements]
        return Block(
            lives.shape,
            live={0: lives.nonzero().flatten()},
            frozen={0: (~lives).nonzero().flatten()},
        )


class FreezePlan:
    """Which part of every parameter lives, for one generation of frozen channels.

    Args:
        network: not wrapped.
        groups: its channel groups.
        frozen: bool ``[num_channels]``, True = frozen.
        scope: which slices of a frozen channel freeze.
        silent: bool ``[num_channels]``, frozen channels that put out exact zeros: the gradients of
            their consumers' columns are exact zeros too, so these need not be sent in any scope.

    Attributes:
        blocks: a block for every parameter with a frozen part, by parameter; also for those that do
            not train at the moment.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Groups,
        frozen: Tensor,
        scope: Scope,
        silent: Tensor | None = None,
    ) -> None:
        parameters = dict(network.named_parameters())
        frozen_along: dict[str, dict[int, Tensor]] = {}
        silent = torch.zeros_like(frozen) if silent is None else silent
        here = zip(groups, groups.split(frozen).values(), groups.split(silent).values())
        for group, frozen_here, silent_here in here:
            for member in group.members:
                freezes = _freezes(group, member, scope)
                channels = frozen_here if freezes else silent_here & (member.role == "consumer")
                if bool(channels.any()):
                    places = member.positions[channels].flatten()
                    for name, dim in member.parameters:
                        shape = parameters[name].shape
                        along = frozen_along.setdefault(name, {})
                        along.setdefault(dim, torch.zeros(shape[dim], dtype=torch.bool))[places] = 1
        self.blocks: dict[Tensor, Block] = {
            parameters[name]: _block(parameters[name], along)
            for name, along in frozen_along.items()
        }

    def num_live(self, parameters: Iterable[Tensor]) -> int:
        """How many elements of these parameters live."""
        return sum(self.blocks[p].num_live if p in self.blocks else p.numel() for p in parameters)

    def live_fraction(self, parameters: Collection[Tensor]) -> float:
        """How many that is, of all their elements."""
        return self.num_live(parameters) / sum(p.numel() for p in parameters)


def _freezes(group: ChannelGroup, member: Member, scope: Scope) -> bool:
    """Whether a frozen channel's slices in a member freeze; ``norm`` means whatever scales it."""
    if member in group.silencers or scope == "coupled":
        return True
    # A gate is a factor of the columns that read its channel: they freeze together.
    return scope == "producer" and (member.role == "producer" or bool(group.gates))


def _block(parameter: nn.Parameter, along: Mapping[int, Tensor]) -> Block:
    def places(flags: Tensor) -> Tensor:
        return flags.nonzero().flatten().to(parameter.device)

    return Block(
        parameter.shape,
        live={dim: places(~flags) for dim, flags in along.items()},
        frozen={dim: places(flags) for dim, flags in along.items()},
    )
