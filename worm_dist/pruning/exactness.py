"""Exactness: finds the groups that can be drawn without changing the network's outputs.

Channels are dropped from a copy of the network (see ``rehearsal``): about half of each group, the
other half, as many as the floor allows, one, and all but one; with the network's own weights and
with random ones.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import SearchConfig
from ..distributed.collectives import Communicator
from ..errors import ConfigError, DivergenceError
from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.copying import scratch_copy
from ..groups.mask import Mask
from ..groups.nested import tensors_in
from ..groups.selection import importance_of, select_groups
from ..groups.tracing import Trace, trace
from .rehearsal import Rehearsal
from .trial_values import (
    crop_large_images,
    perturb_constant_inputs,
    perturb_constant_weights,
    randomize_weights,
)

__all__ = ["agreed_groups", "find_drawable_groups"]

logger = logging.getLogger(__name__)

_NUM_SAMPLES = 3
"""The number of groups of a kind that must fail before all groups of that kind are rejected."""
_NUM_ROUNDS = 6
_MAX_TRIALS = 100
"""The number of trials after which undecided groups stay dense.  Counted, not timed, so that all
ranks give up at the same point."""
_SECONDS_BEFORE_WARNING = 3.0
_RANDOM_TOLERANCE = 1e-6
"""A deep network with random weights amplifies rounding errors as it amplifies every other."""


def agreed_groups(
    network: nn.Module,
    example_inputs: Any,
    ranks: Communicator,
    search: SearchConfig,
    any_group: bool = False,
    optional: bool = False,
) -> Groups:
    """Run ``find_drawable_groups`` on every rank and compare the results.  Collective.

    Args:
        network: the unwrapped network.
        example_inputs: inputs as for ``find_drawable_groups``.
        ranks: the communicator of the ranks to compare.
        search: the search settings.
        any_group: whether a custom importance ranks the groups.
        optional: whether a network without groups is accepted.

    Raises:
        ConfigError: as in ``find_drawable_groups``.
        DivergenceError: the ranks find different groups, or tracing failed on another rank.
    """
    try:
        groups = find_drawable_groups(network, example_inputs, search, any_group, optional)
    except Exception as error:  # any error, since the other ranks wait in the comparison
        with suppress(DivergenceError):  # raised on the others; the original error says more
            ranks.assert_equal({"structure": {"(none)": str(error).encode()}}, "attach")
        raise
    ranks.assert_equal({"structure": groups.digests}, "attach")
    by_weights = bool(groups) and importance_of(search, groups) == "weight_norm"
    if by_weights and search.importance == "auto" and not any_group and ranks.rank == 0:
        logger.warning(
            "attach: no group has a norm or a gate, so channels are ranked by the norm of the "
            "weights that produce them; search.importance 'weight_norm' avoids this warning"
        )
    return groups


def find_drawable_groups(
    network: nn.Module,
    example_inputs: Any,
    search: SearchConfig | None = None,
    any_group: bool = False,
    optional: bool = False,
) -> Groups:
    """Find the channel groups that are searched and can be drawn exactly.

    Needs a few copies of the network in double precision, and some forward passes.

    Args:
        network: the unwrapped network.
        example_inputs: one input, a tuple of inputs, or a dict of keyword inputs, on the
            network's device.
        search: the search settings that select groups; default ``SearchConfig()``.
        any_group: whether a custom importance ranks the groups, so that norms and gates are not
            needed.
        optional: whether a network without groups is accepted.

    Raises:
        ConfigError: the network cannot be run with these inputs, or has no such group.
    """
    search = search or SearchConfig()
    _log("tracing the network")
    crops = crop_large_images(example_inputs)
    traced = trace(network, example_inputs, None if crops is example_inputs else crops)
    groups = select_groups(traced.groups, search, any_group)
    if groups:
        with scratch_copy(network) as network_copy, torch.no_grad():
            trial = _Trial(network_copy, groups, traced, search.min_keep_ratio)
            groups = groups.without(trial.inexact())
    _log(f"found {len(groups)} channel groups with {groups.num_channels} channels")
    if not groups and not optional:
        because = "".join(f"\n  {name}: {reason}" for name, reason in groups.dense.items())
        lacks = {
            "norm_scale": "with a BatchNorm to rank its channels by; search.importance 'auto' "
            "needs none",
            "gate": "with a gate to rank its channels by; worm_dist.add_gates(network), before it "
            "is wrapped, gives a transformer gates, and search.importance 'auto' needs none",
        }.get(search.importance, "of which channels can be dropped")
        raise ConfigError(f"model: it has no channel group {lacks}{because}")
    return groups


class _Trial:
    """Trial draws of parts of groups from copies of a network.

    Args:
        network: a copy of the network, in eval mode.
        groups: the groups to try.
        traced: the trace of the network.
        floor: the share of its channels that every group keeps at least.
    """

    def __init__(self, network: nn.Module, groups: Groups, traced: Trace, floor: float) -> None:
        self._groups = groups
        self._floor = floor
        self._kinds = {group.name: _kind(network, group) for group in groups}
        self._original = Rehearsal(network, traced.example_inputs, calls=traced.calls)
        inputs = perturb_constant_inputs(traced.example_inputs)
        if all(map(operator.is_, tensors_in(inputs), tensors_in(traced.example_inputs))):
            randomized = self._original.copy(_RANDOM_TOLERANCE)
        else:
            randomized = Rehearsal(network, inputs, _RANDOM_TOLERANCE)
        perturb_constant_weights(self._original.network)
        randomize_weights(randomized.network, randomized.run)
        self._randomized = randomized if randomized.is_finite else self._original
        self._num_trials = 0
        self._started_at, self._has_warned = time.monotonic(), False

    def inexact(self) -> dict[str, str]:
        """Return the groups that must not be drawn, by name, with the reasons."""
        found: dict[str, str] = {}
        for number, (rehearsal, keep) in enumerate(self._rounds(), 1):
            _log(
                f"verifying the couplings of {len(self._groups)} channel groups, "
                f"round {number} of {_NUM_ROUNDS}"
            )
            rest = [group for group in self._groups if group.name not in found]
            # Groups of one kind are adjacent, since they usually fail together.
            rest.sort(key=lambda group: self._kinds[group.name])
            found |= self._inexact(rest, rehearsal, keep)
        return found

    def _rounds(self) -> Iterator[tuple[Rehearsal, Mapping[str, Tensor]]]:
        """Yield the rounds: a rehearsal, with own or random weights, and the kept channels.

        Which and how many channels are kept is random, since a regular pattern would hide
        channels that are tied to one another and groups that need equal counts.  Where only one
        channel of a group is kept, the next group is whole; otherwise, in a network without
        shortcuts, too little would reach the outputs to reveal an error.
        """
        generator = torch.Generator().manual_seed(0)
        orders = {
            group.name: torch.randperm(group.num_channels, generator=generator)
            for group in self._groups
        }
        sizes = self._groups.sizes
        # At least two where possible: a wrong order of channels shows only with two of them.
        fewest = {name: 2 if size >= 4 else 1 for name, size in sizes.items()}
        some = {
            name: int(torch.randint(few, max(2, sizes[name] - few + 1), (), generator=generator))
            for name, few in fewest.items()
        }
        group_number = {name: number for number, name in enumerate(sizes)}

        def keeping(first: Callable[[str], int], last: Callable[[str], int]) -> dict[str, Tensor]:
            """Keep the channels between two positions in the random order of each group."""
            keep = {}
            for name, size in sizes.items():
                kept = torch.zeros(size, dtype=torch.bool)
                kept[orders[name][first(name) : last(name)]] = True
                keep[name] = kept
            return keep

        yield self._original, keeping(some.__getitem__, sizes.__getitem__)
        yield self._original, keeping(lambda name: 0, some.__getitem__)
        yield (
            self._randomized,
            keeping(lambda name: 0, lambda name: max(1, round(self._floor * sizes[name]))),
        )
        yield self._randomized, keeping(lambda name: min(1, sizes[name] - 1), sizes.__getitem__)
        alternating = [
            {name: 1 if group_number[name] % 2 == odd else sizes[name] for name in sizes}
            for odd in (0, 1)
        ]
        yield self._randomized, keeping(lambda name: 0, alternating[0].__getitem__)
        yield self._randomized, keeping(lambda name: 0, alternating[1].__getitem__)

    def _inexact(
        self, tried: Sequence[ChannelGroup], rehearsal: Rehearsal, keep: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Find by bisection the groups among ``tried`` that must not be drawn, with reasons."""
        reason = self._difference(tried, rehearsal, keep) if tried else None
        if reason is None:
            return {}
        if len(tried) == 1:
            return {tried[0].name: reason}
        if self._num_trials > _MAX_TRIALS:
            reason = f"after {_MAX_TRIALS} trials it is still in doubt ({reason})"
            return {group.name: reason for group in tried}
        kinds = list(dict.fromkeys(self._kinds[group.name] for group in tried))
        if len(kinds) == 1 and len(tried) > _NUM_SAMPLES:
            samples = tried[:: -(-len(tried) // _NUM_SAMPLES)]
            if all(self._difference([group], rehearsal, keep) for group in samples):
                return {group.name: reason for group in tried}
        middle = len(tried) // 2
        if len(kinds) > 1:
            early = kinds[: len(kinds) // 2]
            middle = sum(self._kinds[group.name] in early for group in tried)
        found = self._inexact(tried[:middle], rehearsal, keep)
        found |= self._inexact(tried[middle:], rehearsal, keep)
        if not found:
            # Each half alone is exact, so the error needs groups of both: none is safe.
            return {group.name: reason for group in tried}
        rest = [group for group in tried if group.name not in found]
        return found | self._inexact(rest, rehearsal, keep)

    def _difference(
        self, tried: Sequence[ChannelGroup], rehearsal: Rehearsal, keep: Mapping[str, Tensor]
    ) -> str | None:
        """Return what is wrong after these groups have lost channels; None if nothing."""
        self._num_trials += 1
        took = time.monotonic() - self._started_at
        if took > _SECONDS_BEFORE_WARNING and not self._has_warned and _is_rank_zero():
            self._has_warned = True
            if not logger.isEnabledFor(logging.INFO):  # which shows every round
                logger.warning(
                    "attach: channels are dropped from a copy of the network to find out which of "
                    "its %d groups can be; this takes a while",
                    len(self._groups),
                )
        names = {group.name for group in tried}
        mask = Mask(
            {
                name: keep[name] if name in names else torch.ones_like(keep[name])
                for name in self._groups.sizes
            }
        )
        return rehearsal.difference(self._groups, mask, tried)


def _log(activity: str) -> None:
    """Log what a call that may take minutes does at the moment."""
    if _is_rank_zero():
        logger.info("attach: %s", activity)


def _is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _kind(network: nn.Module, group: ChannelGroup) -> str:
    """Return a group's kind: the class of its enclosing module and its name within that."""
    *path, leaf = group.name.split(".")
    while path:
        parent = network.get_submodule(".".join(path))
        if not isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return f"{type(parent).__name__}.{leaf}"
        leaf = f"{path.pop()}.{leaf}"
    return leaf
