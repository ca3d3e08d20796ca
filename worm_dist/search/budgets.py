"""Budgets: pools of groups that are ranked together, and the share of channels each pool drops.

With one global threshold all groups form one pool; a group that is pruned by itself is its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ..errors import ConfigError

__all__ = ["Pool", "pools_of"]


@dataclass(frozen=True)
class Pool:
    """Groups whose channels are ranked together.

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
        """Return how many of the pool's channels to drop, rounded down as in decimal arithmetic
        (0.29 * 100 is 29, not 28.999999999999996)."""
        return int(round(self.ratio * num_channels, 9))

    def __str__(self) -> str:
        first, *others = self.groups
        return f"groups {first} and {len(others)} more" if others else f"group {first}"


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
