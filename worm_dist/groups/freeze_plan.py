"""Freeze plan: the live and the frozen part of every parameter, given the frozen channels.

A frozen channel freezes its scales, whole rows of its producers and, in scope ``coupled``, whole
columns of its consumers.  So the live part of a parameter is always a block: a subset of rows times
a subset of columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from .channel_groups import ChannelGroup, Groups, Member
from .full_shape import full_numel, full_shape

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

    def live_elements(self, stride: Sequence[int]) -> Tensor:
        """int64 ``[live elements]``: where they are in the memory of a tensor of this shape, row by
        row.

        Args:
            stride: the tensor's stride; it is dense, in whatever order of dimensions.
        """
        elements = self._elements(stride)
        for dim, live in self.live.items():
            elements = elements.index_select(dim, live)
        return elements.reshape(-1)

    def frozen_elements(self, stride: Sequence[int]) -> Tensor:
        """int64 ``[frozen elements]``: where they are; see ``live_elements``."""
        found, rest = [], self._elements(stride)
        for dim, frozen in self.frozen.items():
            found.append(rest.index_select(dim, frozen).reshape(-1))
            rest = rest.index_select(dim, self.live[dim])
        return torch.cat(found)

    def _elements(self, stride: Sequence[int]) -> Tensor:
        device = next(iter(self.live.values())).device
        return torch.arange(self.shape.numel(), device=device).as_strided(self.shape, stride)

    def rows(self, first: int, num_rows: int) -> Block:
        """Return the block of some rows of the parameter, as a parameter of its own."""
        if num_rows == self.shape[0]:
            return self

        def here(indices: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {
                dim: at[(at >= first) & (at < first + num_rows)] - first if dim == 0 else at
                for dim, at in indices.items()
            }

        shape = torch.Size((num_rows, *self.shape[1:]))
        return Block(shape, here(self.live), here(self.frozen))

    def of_shard(self, begin: int, shape: torch.Size) -> Block:
        """Return the block of a shard of this shape: of whole rows, or of the flattened parameter.

        Args:
            begin: index of its first element in the flattened parameter.
            shape: its shape; if it has several dimensions, the later ones are the parameter's.
        """
        if len(shape) > 1:
            return self.rows(begin // max(1, self.shape[1:].numel()), shape[0])
        return self.part(begin, shape.numel())

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
        scales: by name of every scale parameter of a channel, bool ``[elements]``, True = frozen,
            instead of ``frozen``: each norm or gate freezes by its own flags, also where a channel
            has several.  Only scales and shifts freeze then.

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
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        parameters = dict(network.named_parameters())
        frozen_along: dict[str, dict[int, Tensor]] = {}
        zero_output = torch.zeros_like(frozen) if zero_output is None else zero_output
        here = zip(groups, groups.split(frozen).values(), groups.split(zero_output).values())
        for group, frozen_here, zero_here in here:
            for member in group.members:
                freezes = _freezes(group, member, scope)
                if scales is not None:
                    flags = scales.get(member.parameters[0][0])
                    if freezes and flags is not None and bool(flags.any()):
                        for name, dim in member.parameters:
                            frozen_along.setdefault(name, {})[dim] = flags
                    continue
                channels = frozen_here if freezes else zero_here & (member.role == "consumer")
                if bool(channels.any()):
                    indices = member.positions[channels].flatten()
                    for name, dim in member.parameters:
                        shape = full_shape(parameters[name])
                        along = frozen_along.setdefault(name, {})
                        flags = along.setdefault(dim, torch.zeros(shape[dim], dtype=torch.bool))
                        flags[indices] = True
        self.blocks = _blocks({parameters[name]: along for name, along in frozen_along.items()})

    def num_live(self, parameters: Iterable[Tensor]) -> int:
        """Return the number of live elements of these parameters."""
        return sum(
            self.blocks[p].num_live if p in self.blocks else full_numel(p) for p in parameters
        )

    def live_fraction(self, parameters: Collection[Tensor]) -> float:
        """Return the live share of all elements of these parameters, 0 to 1."""
        return self.num_live(parameters) / sum(map(full_numel, parameters))


def _freezes(group: ChannelGroup, member: Member, scope: Scope) -> bool:
    """Whether the slices of frozen channels in a member freeze; scope ``norm`` covers gates too."""
    if member in group.zeroing_members or scope == "coupled":
        return True
    # A gate scales the columns that read its channel, so they freeze together.
    return scope == "producer" and (member.role == "producer" or bool(group.gates))


def _blocks(frozen_along: Mapping[Tensor, Mapping[int, Tensor]]) -> dict[Tensor, Block]:
    """The block of each parameter, given flags of its frozen indices by dimension, on the CPU.

    All indices go to a device in one copy: one for each slice would stall it hundreds of times.
    """
    on_cpu = {
        (parameter, dim, is_frozen): (flags == is_frozen).nonzero().flatten()
        for parameter, along in frozen_along.items()
        for dim, flags in along.items()
        for is_frozen in (False, True)
    }
    indices: dict[tuple[Tensor, int, bool], Tensor] = {}
    for device in {parameter.device for parameter in frozen_along}:
        here = {key: value for key, value in on_cpu.items() if key[0].device == device}
        sizes = [value.numel() for value in here.values()]
        indices |= dict(zip(here, torch.cat(list(here.values())).to(device).split(sizes)))
    return {
        parameter: Block(
            full_shape(parameter),
            live={dim: indices[parameter, dim, False] for dim in along},
            frozen={dim: indices[parameter, dim, True] for dim in along},
        )
        for parameter, along in frozen_along.items()
    }
