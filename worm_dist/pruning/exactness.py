"""Trial: which groups can be drawn without changing what the network computes.

Channels are dropped from a copy of the network (see ``rehearsal``): about half of each group, the
other half, all but the fewest that the floor allows, all but one, and one; and not only with the
weights that it happens to have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SearchConfig
from ..distributed.collectives import Communicator
from ..errors import ConfigError, DivergenceError
from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.copying import scratch
from ..groups.forward import run
from ..groups.selection import chosen, importance_of
from ..groups.tracing import find_groups
from ..search.mask import Mask
from .rehearsal import Rehearsal
from .trial_values import corners, other_inputs, take_other_values, unsettle

__all__ = ["agreed_groups", "find_drawable_groups"]

logger = logging.getLogger(__name__)

_NUM_SAMPLES = 3
"""Groups of a kind that must all fail before the others of that kind are taken to fail too."""
_MOST_TRIALS = 100
"""After so many, what is still in doubt stays dense.  Counted, not timed, so that all ranks give up
at the same place."""
_SECONDS_IN_SILENCE = 3.0


def agreed_groups(
    network: nn.Module,
    example_inputs: Any,
    ranks: Communicator,
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
    by_weights = bool(groups) and importance_of(search, groups) == "weight_norm"
    if by_weights and search.importance == "auto" and not any_group and ranks.rank == 0:
        logger.warning(
            "attach: no group has a norm or a gate, so channels are ranked by the norm of the "
            "weights that make them; search.importance 'weight_norm' says so without this line"
        )
    return groups


def find_drawable_groups(
    network: nn.Module,
    example_inputs: Any,
    search: SearchConfig | None = None,
    any_group: bool = False,
    optional: bool = False,
) -> Groups:
    """The channel groups of a network that are searched, all of which can be drawn exactly.

    Costs a few copies of the network in double precision, and some forward passes.

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
    inputs = _lighter(network, example_inputs)
    groups = chosen(find_groups(network, inputs), search, any_group)
    with scratch(network) as apart, torch.no_grad():
        trial = _Trial(apart, groups, inputs, search.floor)
        groups = groups.without(trial.inexact())
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


def _lighter(network: nn.Module, example_inputs: Any) -> Any:
    """A corner of large images, if the network runs on that: channels are the same there."""
    inputs = corners(example_inputs)
    if inputs is example_inputs:
        return inputs
    with scratch(network) as apart, torch.no_grad():
        try:
            run(apart, inputs)
        except Exception:  # whatever a foreign forward may raise
            return example_inputs
    return inputs


class _Trial:
    """Draws parts of groups from copies of a network.

    Args:
        network: a copy, in eval mode.
        groups: of the network.
        example_inputs: as for ``forward.run``.
        floor: share of its channels that every group keeps.
    """

    def __init__(
        self, network: nn.Module, groups: Groups, example_inputs: Any, floor: float
    ) -> None:
        self._groups = groups
        self._floor = floor
        self._kinds = {group.name: _kind(network, group) for group in groups}
        self._as_it_is = Rehearsal(network, example_inputs)
        unsettle(self._as_it_is.network)
        otherwise = Rehearsal(network, other_inputs(example_inputs))
        take_other_values(otherwise.network, otherwise.run)
        self._otherwise = otherwise if otherwise.is_finite else self._as_it_is
        self._num_trials = 0
        self._begun_at, self._is_told = time.monotonic(), False

    def inexact(self) -> dict[str, str]:
        """The groups that must not be drawn, each with the reason."""
        found: dict[str, str] = {}
        for rehearsal, keep in self._rounds():
            rest = [group for group in self._groups if group.name not in found]
            # Groups of one kind stay together, since they fail together.
            rest.sort(key=lambda group: self._kinds[group.name])
            found |= self._inexact(rest, rehearsal, keep)
        return found

    def _rounds(self) -> Iterator[tuple[Rehearsal, Mapping[str, Tensor]]]:
        """What is dropped together, and with which values.

        Which and how many channels is drawn at random: what must not be dropped alone, or only as
        many here as there, would not be noticed with every other channel.  Where only one channel
        is kept the next group is whole, or in a network without shortcuts nothing would get through
        to tell of what is wrong.
        """
        generator = torch.Generator().manual_seed(0)
        orders = {
            group.name: torch.randperm(group.num_channels, generator=generator)
            for group in self._groups
        }
        sizes = self._groups.sizes
        # Two at least, where there are enough: that a channel has moved shows only beside another.
        fewest = {name: 2 if size >= 4 else 1 for name, size in sizes.items()}
        some = {
            name: int(torch.randint(few, max(2, sizes[name] - few + 1), (), generator=generator))
            for name, few in fewest.items()
        }
        place = {name: number for number, name in enumerate(sizes)}

        def keeping(first: Callable[[str], int], last: Callable[[str], int]) -> dict[str, Tensor]:
            """Of each group the channels between two places in its order."""
            keep = {}
            for name, size in sizes.items():
                kept = torch.zeros(size, dtype=torch.bool)
                kept[orders[name][first(name) : last(name)]] = True
                keep[name] = kept
            return keep

        yield self._as_it_is, keeping(some.__getitem__, sizes.__getitem__)
        yield self._as_it_is, keeping(lambda name: 0, some.__getitem__)
        yield (
            self._otherwise,
            keeping(lambda name: 0, lambda name: max(1, round(self._floor * sizes[name]))),
        )
        yield self._otherwise, keeping(lambda name: min(1, sizes[name] - 1), sizes.__getitem__)
        thin = [
            {name: 1 if place[name] % 2 == odd else sizes[name] for name in sizes} for odd in (0, 1)
        ]
        yield self._otherwise, keeping(lambda name: 0, thin[0].__getitem__)
        yield self._otherwise, keeping(lambda name: 0, thin[1].__getitem__)

    def _inexact(
        self, tried: Sequence[ChannelGroup], rehearsal: Rehearsal, keep: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Of the groups tried, those that must not be drawn."""
        reason = self._difference(tried, rehearsal, keep) if tried else None
        if reason is None:
            return {}
        if len(tried) == 1:
            return {tried[0].name: reason}
        if self._num_trials > _MOST_TRIALS:
            reason = f"after {_MOST_TRIALS} trials it is still in doubt ({reason})"
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
            # Each part alone is exact: what is wrong lies between groups, so none is safe.
            return {group.name: reason for group in tried}
        rest = [group for group in tried if group.name not in found]
        return found | self._inexact(rest, rehearsal, keep)

    def _difference(
        self, tried: Sequence[ChannelGroup], rehearsal: Rehearsal, keep: Mapping[str, Tensor]
    ) -> str | None:
        """What is wrong once these groups have lost channels; None if nothing."""
        self._num_trials += 1
        if not self._is_told and time.monotonic() - self._begun_at > _SECONDS_IN_SILENCE:
            self._is_told = True
            logger.warning(
                "attach: channels are dropped from a copy of the network to find out which of its "
                "%d groups can be; this takes a while",
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


def _kind(network: nn.Module, group: ChannelGroup) -> str:
    """The class of the module that a group is a part of, and which part it is."""
    *path, leaf = group.name.split(".")
    while path:
        parent = network.get_submodule(".".join(path))
        if not isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return f"{type(parent).__name__}.{leaf}"
        leaf = f"{path.pop()}.{leaf}"
    return leaf
