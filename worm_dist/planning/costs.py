"""Costs of a network: parameters, FLOPs and gradient bytes, attributed to channel groups.

A filter belongs to the group whose channels it produces, a scale and a shift to the group whose
channels they normalise.  So every element belongs to one group or, like a classifier's, to none,
and the groups' costs and the rest add up to the network's.  Columns that read dropped channels
reduce the cost of the group that their layer produces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..groups.channel_groups import ChannelGroup, Groups, Member
from ..groups.flops import count_flops_by_module
from ..groups.freeze_plan import FreezePlan
from ..groups.mask import Mask
from ..pruning.predicted_cost import gradient_bytes

__all__ = ["Cost", "Costs", "costs_of", "truncated"]


@dataclass(frozen=True)
class Cost:
    """Cost of a group or a network.

    Attributes:
        parameters: number of elements.
        flops: floating point operations of one sample's forward pass; a multiply and an add count
            as two.
        payload_bytes: bytes of gradients that a rank passes to the all-reduce in a step.
    """

    parameters: int
    flops: int
    payload_bytes: int


@dataclass(frozen=True)
class Costs:
    """Costs of a network.

    Attributes:
        groups: the cost of each group, by name.
        total: the cost of the whole network.
        payload_bytes: bytes of gradients that a rank passes to the all-reduce, by parameter.
        flops: FLOPs of each module, by name.
    """

    groups: Mapping[str, Cost]
    total: Cost
    payload_bytes: Mapping[str, int]
    flops: Mapping[str, int]

    @property
    def rest(self) -> Cost:
        """Cost of the elements that belong to no group."""
        return Cost(
            self.total.parameters - sum(cost.parameters for cost in self.groups.values()),
            self.total.flops - sum(cost.flops for cost in self.groups.values()),
            self.total.payload_bytes - sum(cost.payload_bytes for cost in self.groups.values()),
        )


def costs_of(
    network: nn.Module, groups: Groups, mask: Mask, sample: Tensor, compression: str
) -> Costs:
    """Costs of a network whose gradients are all sent.

    Args:
        network: the network drawn with ``mask``, or the dense one if the mask keeps everything.
        groups: the channel groups of the dense network, with the parameter names of ``network``.
        mask: the channels that ``network`` has.
        sample: an input with a batch size of one.
        compression: the setting ``truncation.compression``.
    """
    parameters = dict(network.named_parameters())
    shapes = {name: p.shape for name, p in parameters.items()}
    bytes_each = gradient_bytes(parameters, compression)
    flops = count_flops_by_module(network, sample)
    payload_bytes = {name: p.numel() * bytes_each[name] for name, p in parameters.items()}
    by_group = {}
    for group in groups:
        keep = mask[group.name]
        elements = {
            (name, dim): member.positions[keep].numel()
            for member in _owning_members(group)
            for name, dim in member.parameters
        }
        by_group[group.name] = Cost(
            _weighted_sum(elements, shapes, dict.fromkeys(parameters, 1)),
            sum(
                _share(flops[module], member, keep, shapes)
                for module, member in _modules_of(_owning_members(group)).items()
            ),
            _weighted_sum(elements, shapes, bytes_each),
        )
    return Costs(
        by_group,
        Cost(
            sum(p.numel() for p in parameters.values()),
            sum(flops.values()),
            sum(payload_bytes.values()),
        ),
        payload_bytes,
        flops,
    )


def truncated(
    dense: Costs, network: nn.Module, groups: Groups, plan: FreezePlan, compression: str
) -> Costs:
    """Costs of the dense network while only live gradients are sent; the FLOPs stay the same.

    Args:
        dense: the costs of the same network without truncation.
        network: the dense network.
        groups: its channel groups.
        plan: the live part of every parameter.
        compression: the setting ``truncation.compression``.
    """
    parameters = dict(network.named_parameters())
    shapes = {
        name: plan.blocks[p].live_shape if p in plan.blocks else tuple(p.shape)
        for name, p in parameters.items()
    }
    bytes_each = gradient_bytes(parameters, compression)
    by_group = {}
    for group in groups:
        live = {
            (name, dim): _num_live(plan, parameters[name], dim, member.positions)
            for member in _owning_members(group)
            for name, dim in member.parameters
        }
        before = dense.groups[group.name]
        own = _weighted_sum(live, shapes, bytes_each)
        by_group[group.name] = Cost(before.parameters, before.flops, own)
    payload_bytes = {name: prod(shape) * bytes_each[name] for name, shape in shapes.items()}
    total = Cost(dense.total.parameters, dense.total.flops, sum(payload_bytes.values()))
    return Costs(by_group, total, payload_bytes, dense.flops)


def _owning_members(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if member.role != "consumer"]


def _modules_of(members: Sequence[Member]) -> dict[str, Member]:
    """One member for each module that computes channels: the member's module and, in an attention,
    the module that holds the parameters."""
    return {
        module: member
        for member in members
        for module in (member.module, member.parameters[0][0].rpartition(".")[0])
    }


def _weighted_sum(
    rows: Mapping[tuple[str, int], int],
    shapes: Mapping[str, Sequence[int]],
    weights: Mapping[str, int],
) -> int:
    """Sum over parameters of the elements in a number of rows, times the weight of an element.

    Args:
        rows: number of rows, by parameter name and dimension.
        shapes: parameter shapes, by name.
        weights: weight of one element, by parameter name.
    """
    return sum(
        num_rows * prod(size for d, size in enumerate(shapes[name]) if d != dim) * weights[name]
        for (name, dim), num_rows in rows.items()
    )


def _share(flops: int, member: Member, keep: Tensor, shapes: Mapping[str, Sequence[int]]) -> int:
    """FLOPs of a module for the kept channels of one member; all channels cost the same.

    A module that reads a concatenation may belong to several groups.
    """
    name, dim = member.parameters[0]
    return flops * member.positions[keep].numel() // shapes[name][dim]


def _num_live(plan: FreezePlan, parameter: nn.Parameter, dim: int, positions: Tensor) -> int:
    block = plan.blocks.get(parameter)
    if block is None or dim not in block.live:
        return positions.numel()
    return int(torch.isin(positions, block.live[dim].cpu()).sum())
