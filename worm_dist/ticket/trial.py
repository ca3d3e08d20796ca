"""Trial: which groups can be drawn without changing what the network computes.

Some channels are dropped from a copy of the network, then all others (see ``rehearsal``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..cluster.agree import Ranks
from ..config import SearchConfig
from ..errors import ConfigError, DivergenceError
from ..search.choice import chosen
from ..search.copying import scratch
from ..search.groups import ChannelGroup, Groups
from ..search.mask import Mask
from ..search.tracing import find_groups
from .rehearsal import Rehearsal

__all__ = ["agreed_groups", "find_drawable_groups"]


def agreed_groups(
    network: nn.Module,
    example_inputs: Any,
    ranks: Ranks,
    search: SearchConfig,
    any_group: bool = False,
    optional: bool = False,
) -> Groups:
    """``find_drawable_groups`` on every rank, with the same result.  Collective.

    Raises:
        ConfigError: as there.
        DivergenceError: the ranks trace different networks, or another rank alone cannot.
    """
    try:
        groups = find_drawable_groups(network, example_inputs, search, any_group, optional)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        with suppress(DivergenceError):  # the others are told; this rank knows more
            ranks.require_equal({"structure": {"(none)": str(error).encode()}}, "attach")
        raise
    ranks.require_equal({"structure": groups.digests}, "attach")
    return groups


def find_drawable_groups(
    network: nn.Module,
    example_inputs: Any,
    search: SearchConfig | None = None,
    any_group: bool = False,
    optional: bool = False,
) -> Groups:
    """The channel groups of a network that are searched, all of which can be drawn exactly.

    Costs a few copies of the network in double precision, and a few forward passes.

    Args:
        network: not wrapped.
        example_inputs: one input, a tuple of inputs, or a dict of keyword inputs, on the
            network's device.
        search: says which groups are searched; default ``SearchConfig()``.
        any_group: whether a score of the user's own ranks them, which needs no norm and no gate.
        optional: whether a network without any such group will do.

    Raises:
        ConfigError: the network cannot be run with these inputs, or has no such group.
    """
    search = search or SearchConfig()
    groups = chosen(find_groups(network, example_inputs), search, any_group)
    with scratch(network) as apart, torch.no_grad():
        trial = _Trial(apart, groups, example_inputs)
        inexact: dict[str, str] = {}
        for half in (0, 1):
            rest = [group for group in groups if group.name not in inexact]
            inexact |= trial.inexact(rest, half)
    groups = groups.without(inexact)
    if not groups and not optional:
        because = "".join(f"\n  {name}: {reason}" for name, reason in groups.dense.items())
        ranked_by = {
            "scale": " with a BatchNorm or a gate to rank its channels by",
            "norm_scale": " with a BatchNorm to rank its channels by",
            "gate": " with a gate to rank its channels by",
            "weight_norm": "",
        }[search.score]
        raise ConfigError(
            f"model: it has no channel group{ranked_by}. worm_dist.add_gates(network), before it "
            "is wrapped, gives a transformer gates; search.score 'weight_norm' needs neither"
            f"{because}"
        )
    return groups


class _Trial:
    """Draws parts of groups from copies of a network."""

    def __init__(self, network: nn.Module, groups: Groups, example_inputs: Any) -> None:
        self._groups = groups
        self._rehearsal = Rehearsal(network, example_inputs)
        _unsettle(self._rehearsal.network)

    def inexact(self, tried: Sequence[ChannelGroup], half: int) -> dict[str, str]:
        """Of the groups tried, those that must not be drawn, each with the reason."""
        reason = self._difference(tried, half) if tried else None
        if reason is None:
            return {}
        if len(tried) == 1:
            return {tried[0].name: reason}
        middle = len(tried) // 2
        found = self.inexact(tried[:middle], half) | self.inexact(tried[middle:], half)
        if not found:
            # Each part alone is exact: what is wrong lies between groups, so none is safe.
            return {group.name: reason for group in tried}
        rest = [group for group in tried if group.name not in found]
        return found | self.inexact(rest, half)

    def _difference(self, tried: Sequence[ChannelGroup], half: int) -> str | None:
        """What is wrong once these groups have lost channels; None if nothing."""
        mask = _without_some(self._groups, tried, half)
        return self._rehearsal.difference(self._groups, mask, tried)


def _without_some(groups: Groups, tried: Sequence[ChannelGroup], half: int) -> Mask:
    """Drops some channels of the groups tried, or else all others, and never a whole group.

    Which and how many is drawn at random: what must not be dropped alone, or only as many here as
    there, would not be noticed with every other channel.
    """
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in groups:
        size = group.num_channels
        kept = torch.ones(size, dtype=torch.bool)
        order = torch.randperm(size, generator=generator)
        first = int(torch.randint(1, max(2, size), (), generator=generator))
        if group in tried and size > 1:
            kept[order[first:] if half else order[:first]] = False
        keep[group.name] = kept
    return Mask(keep)


def _unsettle(network: nn.Module) -> None:
    """Weights that are all equal, such as a head of zeros, would hide what reaches them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))
