"""Freeze plan: the live and the frozen part of every parameter, given the frozen channels.

A frozen channel freezes its scales, whole rows of its producers and, in scope ``coupled``, whole
columns of its consumers.  So the live part of a parameter is always a block: a subset of rows times
a subset of columns.
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
        shape: the shape of the whole parameter.
        live: the live int64 indices of every sliced dimension (0 for rows, 1 for columns), on the
            parameter's device; dimensions that are not listed are live as a whole.
        frozen: the frozen indices of the same dimensions.
        live_shape: the shape of the live part; dimensions as in ``shape``.
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
        """The number of elements of the live part."""
        return prod(self.live_shape)

    def part(self, begin: int, num_elements: int) -> Block:
        """Return the block of a slice of the flattened parameter, such as a ZeRO shard.

        The full slice gives this block itself; a shorter one gives a one-dimensional block.
        """
        if num_elements == self.shape.numel():
            return self
        device = next(iter(self.live.values())).device
        is_live = torch.ones(self.shape, dtype=torch.bool, device=device)
        for dim, frozen in self.frozen.items():
            is_live.index_fill_(dim, frozen, False)
        is_live = is_live.flatten()[begin : begin + num_elements]
        return Block(
            is_live.shape,
            live={0: is_live.nonzero().flatten()},
            frozen={0: (~is_live).nonzero().flatten()},
        )


class FreezePlan:
    """The live part of every parameter, for one generation of frozen channels.

    Args:
        network: the unwrapped network.
        groups: the network's channel groups.
        frozen: bool ``[num_channels]``, True = frozen.
        scope: which slices of a frozen channel freeze.
        zero_output: bool ``[num_channels]``, True = frozen and with an output of exact zeros.  The
            gradients of its consumers' columns are exact zeros too, so they are not sent in any
            scope.

    Attributes:
        blocks: the block of every parameter with a frozen part, by parameter; also for parameters
            with ``requires_grad=False``.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Groups,
        frozen: Tensor,
        scope: Scope,
        zero_output: Tensor | None = None,
    ) -> None:
        parameters = dict(network.named_parameters())
        frozen_along: dict[str, dict[int, Tensor]] = {}
        zero_output = torch.zeros_like(frozen) if zero_output is None else zero_output
        here = zip(groups, groups.split(frozen).values(), groups.split(zero_output).values())
        for group, frozen_here, zero_here in here:
            for member in group.members:
                freezes = _freezes(group, member, scope)
                channels = frozen_here if freezes else zero_here & (member.role == "consumer")
                if bool(channels.any()):
                    indices = member.positions[channels].flatten()
                    for name, dim in member.parameters:
                        shape = parameters[name].shape
                        along = frozen_along.setdefault(name, {})
                        flags = along.setdefault(dim, torch.zeros(shape[dim], dtype=torch.bool))
                        flags[indices] = True
        self.blocks: dict[Tensor, Block] = {
            parameters[name]: _block(parameters[name], along)
            for name, along in frozen_along.items()
        }

    def num_live(self, parameters: Iterable[Tensor]) -> int:
        """Return the number of live elements of these parameters."""
        return sum(self.blocks[p].num_live if p in self.blocks else p.numel() for p in parameters)

    def live_fraction(self, parameters: Collection[Tensor]) -> float:
        """Return the live share of all elements of these parameters, 0 to 1."""
        return self.num_live(parameters) / sum(p.numel() for p in parameters)


def _freezes(group: ChannelGroup, member: Member, scope: Scope) -> bool:
    """Whether the slices of frozen channels in a member freeze; scope ``norm`` covers gates too."""
    if member in group.zeroing_members or scope == "coupled":
        return True
    # A gate scales the columns that read its channel, so they freeze together.
    return scope == "producer" and (member.role == "producer" or bool(group.gates))


def _block(parameter: nn.Parameter, along: Mapping[int, Tensor]) -> Block:
    def indices(flags: Tensor) -> Tensor:
        return flags.nonzero().flatten().to(parameter.device)

    return Block(
        parameter.shape,
        live={dim: indices(~flags) for dim, flags in along.items()},
        frozen={dim: indices(flags) for dim, flags in along.items()},
    )
