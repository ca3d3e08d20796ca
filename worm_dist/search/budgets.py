"""Pools: which groups compete with one another for being kept, and what share of them goes.

Under one threshold for the whole network all groups are one pool.  A group that is cut by itself is
a pool of its own.
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
        ratio: share of the pool's channels to drop, 0 to below 1.
        groups: names; at least one.

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
        """How many of the pool's channels go: rounded down as in decimals, where 0.29 * 100 is 29
        and not 28.999999999999996."""
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
    """Every group in exactly one pool.

    A group that a pattern of ``ratios`` matches is a pool of its own with that ratio, outside the
    global count.  The rest is one pool with ``prune_ratio``, or with ``threshold`` "layer" as many
    pools as groups.  Each pool rounds its own count down, so many small ones drop a little less
    than one.

    Args:
        sizes: channels of each group.
        prune_ratio: share of the channels to drop where no pattern says otherwise.
        threshold: ``global`` or ``layer``.
        ratios: shares by pattern, in the shell's manner and with upper and lower case told apart;
            ``*`` stands for dots too.  The first pattern that matches counts, as in torch's
            quantization settings: write the special before the general.

    Raises:
        ConfigError: a pattern matches no group, or only groups that patterns before it match.
    """
    own: dict[str, float] = {}
    for pattern, ratio in ratios.items():
        matches = [name for name in sizes if fnmatchcase(name, pattern)]
        new = [name for name in matches if name not in own]
        if not new:
            raise ConfigError(_without_effect(pattern, matches, list(sizes)))
        own |= dict.fromkeys(new, ratio)
    rest = tuple(name for name in sizes if name not in own)
    if threshold == "layer":
        own |= dict.fromkeys(rest, prune_ratio)
        rest = ()
    alone = tuple(Pool(own[name], (name,)) for name in sizes if name in own)
    return (*alone, Pool(prune_ratio, rest)) if rest else alone


def _without_effect(pattern: str, matches: Sequence[str], names: Sequence[str]) -> str:
    if matches:
        return (
            f"search.ratios: {pattern!r} matches only what patterns before it match "
            f"({', '.join(matches)}); write it before them"
        )
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names[:3])} and so on"
    return f"search.ratios: {pattern!r} matches no group; {hint}"
