"""Reach: layers that the example inputs do not reach, and the channels that they may use.

An auxiliary norm that runs on request, an expert that the router passes over, a branch for an input
that is optional: nobody knows what such a layer reads.  Cut around it, it would fail at its first
call.  So channels stay dense that it may use: those of its own width that are nearest to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from .channel_groups import ChannelGroup

__all__ = ["reasons_of_unreached"]


def reasons_of_unreached(
    network: nn.Module, reached: Collection[nn.Module], groups: Sequence[ChannelGroup]
) -> dict[str, str]:
    """The groups, by name, that layers out of reach may use, each with the reason.

    Args:
        network: not wrapped.
        reached: the modules that run.
        groups: of the network.
    """
    widths = {
        group.name: {member.positions.numel() for member in group.members} for group in groups
    }
    reasons: dict[str, str] = {}
    for name, module in network.named_modules():
        for width in () if module in reached else _widths(module):
            for outer in _around(name):
                near = [g.name for g in groups if width in widths[g.name] and _within(g, outer)]
                if near:
                    reason = (
                        f"{name}, which the example inputs do not reach, is {width} wide too and "
                        "may use its channels; give inputs that reach it"
                    )
                    reasons |= {group: reasons.get(group, reason) for group in near}
                    break
    return reasons


def _widths(module: nn.Module) -> set[int]:
    """What its own parameters and buffers measure along their first two dimensions."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return {size for tensor in own for size in tensor.shape[:2] if size > 1}


def _around(name: str) -> Iterator[str]:
    """The names of the modules that a module is in, from within to the network."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _within(group: ChannelGroup, outer: str) -> bool:
    return any(
        not outer or member.module == outer or member.module.startswith(f"{outer}.")
        for member in group.members
    )
