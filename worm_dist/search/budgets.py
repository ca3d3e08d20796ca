"""Budgets: groups that are ranked together, and where to stop dropping their channels.

Channels are dropped in a total order, up to a count or a cost.  With one global threshold all
groups form one pool; a group that is pruned by itself is its own.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..groups.cost_model import CostModel
from ..groups.mask import Mask
from ..ratio import exact

__all__ = ["Budget", "Pool", "pools_of"]


@dataclass(frozen=True)
class Pool:
    """Groups whose channels are ranked together, up to a count.

    Attributes:
        ratio: the share of the pool's channels to drop, 0 to below 1.
        groups: the names of the groups; at least one.

    Raises:
        ConfigError: the ratio is out of range.
    """

    ratio: float
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.groups and len(set(self.groups)) == len(self.groups), self.groups
        if not 0 <= self.ratio < 1:
            raise ConfigError(
                f"search: {self.ratio:g} of {self} cannot be dropped; give a ratio from 0 to below "
                "1. To leave a group whole, give 0"
            )

    def num_dropped(self, num_channels: int) -> int:
        """Return how many of the pool's channels to drop, rounded down from the exact product (0.29
        of 100 is 29, not 28.999999999999996; 1/3 of 12 is 4)."""
        return int(exact(self.ratio) * num_channels)

    def position(self, selection: Literal["above", "quantile"], num_channels: int) -> int:
        """Return the position, in ascending order and from 0 on, of the score that channels must
        exceed to be kept.

        ``above`` is ``int(ratio * channels)`` in double precision, as Early-Bird's authors compute
        it (0.7 of 90 gives 62).  A quantile lies between the scores of two positions, or on one;
        what is above it is what is above the lower one.
        """
        if selection == "above":
            return int(num_channels * self.ratio)
        return int(exact(self.ratio) * (num_channels - 1))

    def prefix(self, droppable: Tensor, num_channels: int, floor: float) -> int:
        """Return how many of the droppable channels to drop, the lowest first.

        Args:
            droppable: int64, the pool's channels that may be dropped, in the order of dropping.
            num_channels: the number of all channels of the pool.
            floor: the share of its channels that every group keeps at least.

        Raises:
            ConfigError: the floor leaves fewer than the ratio asks for.
        """
        num_dropped = self.num_dropped(num_channels)
        if droppable.numel() < num_dropped:
            raise ConfigError(
                f"search.min_keep_ratio: {floor:g} protects so many channels of {self} that only "
                f"{droppable.numel()} of {num_channels} may be dropped, but the ratio "
                f"{self.ratio:g} asks for {num_dropped}; lower one of them"
            )
        return num_dropped

    def __str__(self) -> str:
        first, *others = self.groups
        return f"groups {first} and {len(others)} more" if others else f"group {first}"


@dataclass(frozen=True, eq=False)
class Budget:
    """All groups, ranked together, up to a cost: the fewest channels are dropped that meet it.

    Attributes:
        quantity: what is limited: ``flops``, ``parameters``, ``bytes`` or ``channels``.
        share: the most that the ticket costs, as a share of the dense network.
        cost: the cost of the network as a function of the kept channels.
        sizes: the number of channels of each group, in the order of the cost model.
    """

    quantity: str
    share: float
    cost: CostModel
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        assert 0 < self.share <= 1, self.share

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @cached_property
    def limit(self) -> int:
        """The highest cost that meets the budget; the share is a decimal number, and exact."""
        return int(Fraction(str(self.share)) * self.cost.dense)

    def is_met(self, kept: Tensor) -> bool:
        """Whether a ticket meets the budget that keeps so many channels of each group, int64
        ``[G]``."""
        return self.cost.of(kept) <= self.limit

    def share_of(self, mask: Mask) -> float:
        """Return the cost of the ticket of a mask, as a share of the dense network."""
        return self.cost.of(mask.num_kept_by_group) / self.cost.dense

    def prefix(self, droppable: Tensor, num_channels: int, floor: float) -> int:
        """Return how many of the droppable channels to drop, the lowest first.

        Args:
            droppable: int64, the channels that may be dropped, in the order of dropping.
            num_channels: the number of all channels.
            floor: the share of its channels that every group keeps at least.

        Raises:
            ConfigError: the floors alone exceed the budget.
        """
        sizes = torch.tensor(list(self.sizes.values()))
        group_of_N = torch.arange(len(sizes)).repeat_interleave(sizes)

        def kept_after(num_dropped: int) -> Tensor:
            dropped = group_of_N[droppable[:num_dropped]]
            return sizes - dropped.bincount(minlength=len(sizes))

        # A longer prefix never costs more.
        counts = range(droppable.numel() + 1)
        num_dropped = bisect_left(counts, True, key=lambda count: self.is_met(kept_after(count)))
        if num_dropped == len(counts):
            least = self.cost.of(kept_after(droppable.numel())) / self.cost.dense
            raise ConfigError(
                f"search.budget.{self.quantity}: {self.share:g} cannot be met: with "
                f"search.min_keep_ratio {floor:g} the smallest ticket takes {_rounded_up(least)} "
                "of the dense network; raise the one or lower the other"
            )
        return num_dropped


def _rounded_up(share: float) -> float:
    return ceil(share * 1e4) / 1e4


def pools_of(
    sizes: Mapping[str, int],
    prune_ratio: float,
    threshold: Literal["global", "layer"],
    ratios: Mapping[str, float],
) -> tuple[Pool, ...]:
    """Assign every group to exactly one pool.

    A group that matches a pattern of ``ratios`` is a pool by itself with that ratio, outside the
    global count.  The rest is one pool with ``prune_ratio``, or with ``threshold`` "layer" one pool
    per group.  Each pool rounds its count down, so many small pools drop slightly less than one.

    Args:
        sizes: the number of channels of each group.
        prune_ratio: the share of channels to drop in groups that match no pattern.
        threshold: ``global`` or ``layer``.
        ratios: shares by case-sensitive shell pattern; ``*`` matches dots too.  The first matching
            pattern counts, so specific patterns must come before general ones.

    Raises:
        ConfigError: a pattern matches no group, or only groups that patterns before it match.
    """
    by_pattern: dict[str, float] = {}
    for pattern, ratio in ratios.items():
        matches = [name for name in sizes if fnmatchcase(name, pattern)]
        new = [name for name in matches if name not in by_pattern]
        if not new:
            raise ConfigError(_unmatched_message(pattern, matches, list(sizes)))
        by_pattern |= dict.fromkeys(new, ratio)
    rest = tuple(name for name in sizes if name not in by_pattern)
    if threshold == "layer":
        by_pattern |= dict.fromkeys(rest, prune_ratio)
        rest = ()
    single = tuple(Pool(by_pattern[name], (name,)) for name in sizes if name in by_pattern)
    return (*single, Pool(prune_ratio, rest)) if rest else single


def _unmatched_message(pattern: str, matches: Sequence[str], names: Sequence[str]) -> str:
    if matches:
        return (
            f"search.ratios: {pattern!r} matches only what patterns before it match "
            f"({', '.join(matches)}); write it before them"
        )
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names[:3])} and so on"
    return f"search.ratios: {pattern!r} matches no group; {hint}"
