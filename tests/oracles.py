"""Oracles: what the package computes by blocks and buckets, computed here element by element."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worm_dist import Mask
from worm_dist.groups.channel_groups import ChannelGroup, Groups, Member

__all__ = [
    "folded",
    "folded_name",
    "is_gate",
    "live_flags",
    "mask_dropping",
    "scaling_members",
    "scaling_role",
    "zero_frozen",
]

_GATED = ".parametrizations.weight.original"
_GATE = ".parametrizations.weight.0.scale"


def mask_dropping(groups: Groups, *dropped: int) -> Mask:
    """Drops these channels, counted over all groups."""
    keep = torch.ones(groups.num_channels, dtype=torch.bool)
    keep[list(dropped)] = False
    return Mask.from_vector(groups.sizes, keep)


def scaling_role(group: ChannelGroup) -> str:
    """What makes a channel zero: its norms; without them its gate; without that its filters."""
    roles = {member.role for member in group.members}
    return next(role for role in ("norm", "gate", "producer") if role in roles)


def scaling_members(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if member.role == scaling_role(group)]


def live_flags(network: nn.Module, groups: Groups, frozen: Tensor, scope: str) -> dict[str, Tensor]:
    """For every parameter a bool tensor of its shape, False where a frozen channel lies."""
    flags = {n: torch.ones_like(p, dtype=torch.bool) for n, p in network.named_parameters()}
    first = 0
    for group in groups:
        roles = _frozen_roles(group, scope)
        for channel in range(group.num_channels):
            for member in group.members:
                if not frozen[first + channel] or member.role not in roles:
                    continue
                for name, dim in member.parameters:
                    for place in member.positions[channel].tolist():
                        flags[name].select(dim, place).fill_(False)
        first += group.num_channels
    return flags


def _frozen_roles(group: ChannelGroup, scope: str) -> set[str]:
    everything = {"norm", "gate", "producer", "consumer"}
    if scope == "norm":
        return {scaling_role(group)}
    # A gate is learnt by what reads the channel: one without the other would drift.
    is_gated = any(member.role == "gate" for member in group.members)
    if scope == "producer" and not is_gated:
        return {"norm", "producer"}
    return everything


def is_gate(name: str) -> bool:
    """Whether a parameter of this name is one."""
    return name.endswith(_GATE)


def folded_name(name: str) -> str:
    """A parameter's name once gates are folded."""
    return name.replace(_GATED, ".weight")


def folded(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name as they are once gates are folded: a gate is multiplied into the columns
    that it scales, and is gone."""
    plain = {}
    for name, value in values.items():
        if name.endswith(_GATED):
            gate = values[name.replace(_GATED, _GATE)]
            columns = torch.arange(value.shape[1]) // (value.shape[1] // len(gate))
            value = value * gate[columns]
        if not is_gate(name):
            plain[folded_name(name)] = value
    return plain


def zero_frozen(network: nn.Module, flags: dict[str, Tensor]) -> None:
    """Write exact zeros into the gradients of frozen elements."""
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        parameter.grad[~flags[name]] = 0
