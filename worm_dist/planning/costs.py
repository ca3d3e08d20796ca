"""Costs: parameters, operations and bytes of a network, each counted to the group it belongs to.

A filter belongs to the group whose channels it makes, a scale and a shift to the group whose
channels they normalise.  So every element belongs to one group or, like a classifier's, to none,
and the groups' costs and the rest add up to the network's.  Columns that read dropped channels
leave the cost of the group behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..groups.channel_groups import ChannelGroup, Groups, Member
from ..groups.freeze_plan import FreezePlan
from ..search.mask import Mask
from .flops import count_operations

__all__ = ["Cost", "Costs", "costs_of", "truncated"]

_COMPRESSED_BYTES = {"bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Cost:
    """Attributes:
    parameters: elements.
    flops: floating point operations of one sample's forward pass; a multiply and an add are two.
    payload_bytes: gradients that a rank hands to the all-reduce in a step.
    """

    parameters: int
    flops: int
    payload_bytes: int


@dataclass(frozen=True)
class Costs:
    """Attributes:
    groups: of each group, by name.
    total: of the network.
    """

    groups: Mapping[str, Cost]
    total: Cost

    @property
    def rest(self) -> Cost:
        """Of what belongs to no group."""
        return Cost(
            self.total.parameters - sum(cost.parameters for cost in self.groups.values()),
            self.total.flops - sum(cost.flops for cost in self.groups.values()),
            self.total.payload_bytes - sum(cost.payload_bytes for cost in self.groups.values()),
        )


def costs_of(
    network: nn.Module, groups: Groups, mask: Mask, sample: Tensor, compression: str
) -> Costs:
    """Of a network as it is, where all that is sent lives.

    Args:
        network: drawn with this mask; the dense one with a mask that keeps everything.
        groups: of the dense network, the parameters called as in this one.
        mask: which channels there are.
        sample: a batch of one.
        compression: ``truncation.compression``.
    """
    parameters = dict(network.named_parameters())
    shapes = {name: p.shape for name, p in parameters.items()}
    bytes_each = _bytes_each(parameters, compression)
    total_flops, flops = count_operations(network, sample)
    by_group = {}
    for group in groups:
        keep = mask[group.name]
        elements = {
            (name, dim): member.positions[keep].numel()
            for member in _owners(group)
            for name, dim in member.parameters
        }
        by_group[group.name] = Cost(
            _weighed(elements, shapes, dict.fromkeys(parameters, 1)),
            sum(
                _share(flops[module], member, keep, shapes)
                for module, member in _working(_owners(group)).items()
            ),
            _weighed(elements, shapes, bytes_each),
        )
    return Costs(
        by_group,
        Cost(
            sum(p.numel() for p in parameters.values()),
            total_flops,
            sum(p.numel() * bytes_each[name] for name, p in parameters.items()),
        ),
    )


def truncated(
    dense: Costs, network: nn.Module, groups: Groups, plan: FreezePlan, compression: str
) -> Costs:
    """Of the dense network while only the live part of a plan is sent; everything is still
    computed.

    Args:
        dense: of the same network.
        network, groups: dense.
        plan: which part of every parameter lives.
        compression: ``truncation.compression``.
    """
    parameters = dict(network.named_parameters())
    shapes = {
        name: plan.blocks[p].live_shape if p in plan.blocks else tuple(p.shape)
        for name, p in parameters.items()
    }
    bytes_each = _bytes_each(parameters, compression)
    by_group = {}
    for group in groups:
        live = {
            (name, dim): _num_live(plan, parameters[name], dim, member.positions)
            for member in _owners(group)
            for name, dim in member.parameters
        }
        before = dense.groups[group.name]
        payload_bytes = _weighed(live, shapes, bytes_each)
        by_group[group.name] = Cost(before.parameters, before.flops, payload_bytes)
    payload_bytes = sum(prod(shape) * bytes_each[name] for name, shape in shapes.items())
    return Costs(by_group, Cost(dense.total.parameters, dense.total.flops, payload_bytes))


def _owners(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if member.role != "consumer"]


def _working(members: Sequence[Member]) -> dict[str, Member]:
    """One member for each module that computes channels: the member's own and, within attentions,
    the one that holds the parameters."""
    return {
        module: member
        for member in members
        for module in (member.module, member.parameters[0][0].rpartition(".")[0])
    }


def _bytes_each(parameters: Mapping[str, nn.Parameter], compression: str) -> dict[str, int]:
    """Bytes that one element of each parameter's gradient takes; none where nothing trains."""
    return {
        name: min(p.element_size(), _COMPRESSED_BYTES.get(compression, p.element_size()))
        * p.requires_grad
        for name, p in parameters.items()
    }


def _weighed(
    rows: Mapping[tuple[str, int], int],
    shapes: Mapping[str, Sequence[int]],
    weights: Mapping[str, int],
) -> int:
    """Elements in these rows of the parameters, times the weight of an element."""
    return sum(
        num_rows * prod(size for d, size in enumerate(shapes[name]) if d != dim) * weights[name]
        for (name, dim), num_rows in rows.items()
    )


def _share(flops: int, member: Member, keep: Tensor, shapes: Mapping[str, Sequence[int]]) -> int:
    """A module makes all its channels with equal effort; of a concatenation they may belong to
    several groups."""
    name, dim = member.parameters[0]
    return flops * member.positions[keep].numel() // shapes[name][dim]


def _num_live(plan: FreezePlan, parameter: nn.Parameter, dim: int, positions: Tensor) -> int:
    block = plan.blocks.get(parameter)
    if block is None or dim not in block.live:
        return positions.numel()
    return int(torch.isin(positions, block.live[dim].cpu()).sum())
