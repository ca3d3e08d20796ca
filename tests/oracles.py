"""Oracles: what the package computes by blocks and buckets, computed here element by element."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worm_dist import Mask
from worm_dist.search.groups import Groups

__all__ = ["live_flags", "mask_dropping", "zero_frozen"]


def mask_dropping(groups: Groups, *dropped: int) -> Mask:
    """Drops these channels, counted over all groups."""
    keep = torch.ones(groups.num_channels, dtype=torch.bool)
    keep[list(dropped)] = False
    return Mask.from_vector(groups.sizes, keep)


def live_flags(network: nn.Module, groups: Groups, frozen: Tensor, scope: str) -> dict[str, Tensor]:
    """For every parameter a bool tensor of its shape, False where a frozen channel lies."""
    roles = {"norm": {"norm"}, "producer": {"norm", "producer"}}
    flags = {n: torch.ones_like(p, dtype=torch.bool) for n, p in network.named_parameters()}
    first = 0
    for group in groups:
        for channel in range(group.num_channels):
            for member in group.members:
                if not frozen[first + channel] or member.role not in roles.get(
                    scope, {"norm", "producer", "consumer"}
                ):
                    continue
                for name, dim in member.parameters:
                    for place in member.positions[channel].tolist():
                        flags[name].select(dim, place).fill_(False)
        first += group.num_channels
    return flags


def zero_frozen(network: nn.Module, flags: dict[str, Tensor]) -> None:
    """Write exact zeros into the gradients of frozen elements."""
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        parameter.grad[~flags[name]] = 0
