"""Cost model: what the network costs that keeps some channels of each group, without drawing it.

The size of a parameter's dimension is a fixed size plus, for every group that it is cut along, the
kept channels times the indices that one channel takes.  A parameter has the product of its sizes,
and a matrix product or convolution takes operations in proportion to the elements of its weight.
So a cost is a sum of such products; it is exact, and takes microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Size, Tensor

from ..errors import ConfigError
from .channel_groups import Groups

__all__ = ["CostModel"]

_Dimension = tuple[int, Tensor]
"""A fixed size, and the size of one channel of each group, int64 ``[G]``."""


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost as a sum over terms t of ``coefficients[t]`` times the product over factors f of
    ``fixed[t, f] + sum over groups g of per_channel[t, f, g] * kept[g]``.

    Attributes:
        dense: the cost of the dense network.
        coefficients: int64 ``[T]``.
        fixed: int64 ``[T, F]``.
        per_channel: int64 ``[T, F, G]``, groups in network order.
    """

    dense: int
    coefficients: Tensor
    fixed: Tensor
    per_channel: Tensor

    def __post_init__(self) -> None:
        num_terms, num_factors, _ = self.per_channel.shape
        assert self.coefficients.shape == (num_terms,)
        assert self.fixed.shape == (num_terms, num_factors)
        parts = (self.coefficients, self.fixed, self.per_channel)
        # So dropping a channel never raises the cost.
        assert all(part.dtype == torch.int64 and bool((part >= 0).all()) for part in parts)

    def of(self, kept: Tensor) -> int:
        """Return the cost of a network.

        Args:
            kept: int64 ``[G]``, the number of kept channels of each group.
        """
        sizes = self.fixed + (self.per_channel * kept).sum(dim=2)
        return int((self.coefficients * sizes.prod(dim=1)).sum())

    @classmethod
    def build(
        cls,
        groups: Groups,
        dense: int,
        shapes: Mapping[str, Size],
        of_parameters: Mapping[str, int],
        of_groups: Mapping[str, int],
        constant: int = 0,
    ) -> CostModel:
        """Build a model from the costs of the parts of the dense network.

        Args:
            groups: the channel groups of the dense network.
            dense: the cost of the dense network, which may have parts that a ticket has not.
            shapes: the shapes of its parameters, by name.
            of_parameters: costs that are in proportion to the elements of a parameter, by its name.
            of_groups: costs that are in proportion to the channels of a group, by its name.
            constant: the cost that is independent of the mask.

        Raises:
            ConfigError: an index of a parameter belongs to several channels, the channels of a
                group differ in their number of indices, or a cost is not in proportion.
        """
        sliced = _sliced_dimensions(groups, shapes)
        one = torch.eye(len(groups), dtype=torch.int64)
        of_group = {name: (0, one[number]) for number, name in enumerate(groups.sizes)}
        parts = [(name, cost, sliced.get(name, [])) for name, cost in of_parameters.items()]
        parts += [(name, cost, [of_group[name]]) for name, cost in of_groups.items()]
        parts += [("", constant, [])]
        most = max(1, *(len(dimensions) for *_, dimensions in parts))
        padding = [(1, torch.zeros_like(one[0]))] * most
        padded = [[*dimensions, *padding][:most] for *_, dimensions in parts]
        fixed = torch.tensor([[size for size, _ in dimensions] for dimensions in padded])
        per_channel = torch.stack([torch.stack([each for _, each in row]) for row in padded])
        numbers = (fixed + per_channel @ torch.tensor(list(groups.sizes.values()))).prod(dim=1)
        costs = torch.tensor([cost for _, cost, _ in parts])
        for (name, *_), rest in zip(parts, (costs % numbers).tolist()):
            if rest:
                raise ConfigError(f"the cost of {name} is not in proportion to its size")
        return cls(dense, costs // numbers, fixed, per_channel)


def _sliced_dimensions(groups: Groups, shapes: Mapping[str, Size]) -> dict[str, list[_Dimension]]:
    """Return the dimensions that channels are cut from, by parameter name, in units of the largest
    number of indices that divides all of them.

    Raises:
        ConfigError: as in ``CostModel.build``.
    """
    # The number of the channel that each index goes with; several members may say the same.
    channels: dict[tuple[str, int], Tensor] = {}
    numbers = groups.split(torch.arange(groups.num_channels))
    for group in groups:
        for member in group.members:
            indices = member.positions.flatten()
            theirs = numbers[group.name].repeat_interleave(member.positions.shape[1])
            for name, dim in member.parameters:
                here = channels.setdefault((name, dim), torch.full((shapes[name][dim],), -1))
                if bool(((here[indices] >= 0) & (here[indices] != theirs)).any()):
                    raise ConfigError(f"an index of {name} belongs to several channels")
                here[indices] = theirs
    sliced: dict[str, list[_Dimension]] = {}
    for (name, _), here in channels.items():
        counts = groups.split(here[here >= 0].bincount(minlength=groups.num_channels)).values()
        if any(bool((of_group != of_group[0]).any()) for of_group in counts):
            raise ConfigError(f"the channels of {name} differ in size")
        fixed, each = int((here < 0).sum()), torch.stack([of_group[0] for of_group in counts])
        unit = gcd(fixed, *each.tolist())
        sliced.setdefault(name, []).append((fixed // unit, each // unit))
    return sliced
