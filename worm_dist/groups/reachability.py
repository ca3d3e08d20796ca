"""Reachability: layers that the example inputs do not reach, and the channels they may use.

The inputs of such a layer are unknown: an auxiliary norm, an expert that the router skips, a branch
for an optional input.  If the channels it reads were removed, its first call would fail.  So the
nearest groups with the same width as the layer stay dense.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from .channel_groups import ChannelGroup

__all__ = ["reasons_of_unreached"]


def reasons_of_unreached(
    network: nn.Module, reached: Collection[nn.Module], groups: Sequence[ChannelGroup]
) -> dict[str, str]:
    """Find the groups that unreached layers may use, by name, each with the reason.

    Args:
        network: the unwrapped network.
        reached: the modules that run on the example inputs.
        groups: the network's channel groups.
    """
    widths = {
        group.name: {member.positions.numel() for member in group.members} for group in groups
    }
    reasons: dict[str, str] = {}
    for name, module in network.named_modules():
        for width in () if module in reached else _widths(module):
            for outer in _ancestors(name):
                near = [
                    g.name for g in groups if width in widths[g.name] and _has_member_in(g, outer)
                ]
                if near:
                    reason = (
                        f"{name}, which the example inputs do not reach, is {width} wide too and "
                        "may use its channels; give inputs that reach it"
                    )
                    reasons |= {group: reasons.get(group, reason) for group in near}
                    break
    return reasons


def _widths(module: nn.Module) -> set[int]:
    """Return the sizes of a module's own parameters and buffers in their first two dimensions."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return {size for tensor in own for size in tensor.shape[:2] if size > 1}


def _ancestors(name: str) -> Iterator[str]:
    """Yield the names of a module's ancestors, from its parent up to the network ("")."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _has_member_in(group: ChannelGroup, outer: str) -> bool:
    return any(
        not outer or member.module == outer or member.module.startswith(f"{outer}.")
        for member in group.members
    )
