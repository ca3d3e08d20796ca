"""Cut: from scores to the mask that drops exactly the share of each pool.

The order of the channels is total: by score, then by group, then by channel.  No tie can fall
differently on two ranks or in two runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError
from .budgets import Pool
from .mask import Mask

__all__ = ["comparable", "num_protected", "select_channels"]


def select_channels(
    scores: Tensor,
    sizes: Mapping[str, int],
    pools: float | Sequence[Pool],
    floor: float,
    lost: Tensor | None = None,
) -> tuple[Mask, tuple[str, ...]]:
    """Drop the ``int(ratio * channels)`` lowest channels of each pool that the floor does not
    protect.

    In every group the best ``max(1, ceil(floor * channels))`` are protected; what they are spared
    is taken from the other groups of the pool, so its count stays exact.

    Args:
        scores: ``[N]`` floats, groups one after another in the order of ``sizes``.
        sizes: channels of each group.
        pools: each group in one of them, in any order; a number is the ratio of one pool of all.
        floor: share of its channels that every group keeps.
        lost: bool ``[N]``, channels that cannot be kept any more; they are dropped first, also
            where they are more than the pool's share.

    Returns:
        The mask, and the names of the groups in which the floor spared a channel.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
        ConfigError: the floors leave a pool fewer channels than have to be dropped.
    """
    if not isinstance(pools, Sequence):
        pools = (Pool(pools, tuple(sizes)),)
    pool_of = {name: number for number, pool in enumerate(pools) for name in pool.groups}
    num_pooled = sum(len(pool.groups) for pool in pools)
    assert pool_of.keys() == sizes.keys() and num_pooled == len(sizes), "not a partition"
    lost = torch.zeros(scores.numel(), dtype=torch.bool) if lost is None else lost
    channels = torch.tensor(list(sizes.values()))
    group_of_N = torch.arange(len(sizes)).repeat_interleave(channels)
    pool_of_N = torch.tensor([pool_of[name] for name in sizes]).repeat_interleave(channels)
    ascending = comparable(scores, sizes, lost).argsort(stable=True)

    protected = torch.zeros_like(lost)
    for group in _split(ascending, group_of_N):
        protected[group[-num_protected(floor, group.numel()) :]] = True
    protected &= ~lost
    keep = torch.ones_like(lost)
    spared = torch.zeros_like(lost)
    for pool, members in zip(pools, _split(ascending, pool_of_N)):
        num_dropped = max(pool.num_dropped(members.numel()), int(lost[members].sum()))
        free = members[~protected[members]]
        if free.numel() < num_dropped:
            raise ConfigError(
                f"search.floor: {floor:g} protects so many channels of {pool} that only "
                f"{free.numel()} of {members.numel()} may be dropped, but the ratio {pool.ratio:g} "
                f"asks for {num_dropped}; lower one of them"
            )
        keep[free[:num_dropped]] = False
        lowest = members[:num_dropped]
        spared[lowest] = protected[lowest]

    names = list(sizes)
    floored = tuple(names[group] for group in group_of_N[spared].unique().tolist())
    return Mask.from_vector(sizes, keep), floored


def comparable(scores: Tensor, sizes: Mapping[str, int], lost: Tensor) -> Tensor:
    """Scores as float64 ``[N]`` on the CPU, lost channels below all others.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
    """
    scores = scores.detach().cpu().double()
    finite = scores.isfinite()
    if not bool(finite.all()):
        group = _group_of(int((~finite).nonzero()[0]), sizes)
        raise NonFiniteError(
            f"group {group}: its scores are not finite; the weights diverged, lower the "
            "learning rate"
        )
    return scores.masked_fill(lost, -torch.inf)


def num_protected(floor: float, size: int) -> int:
    """How many channels of a group the floor keeps."""
    # Rounded, or 0.07 of 100 channels, 7.000000000000001 in floats, would be 8.
    return max(1, ceil(round(floor * size, 9)))


def _split(ascending: Tensor, part_of_N: Tensor) -> tuple[Tensor, ...]:
    """The channels of part 0, of part 1 and so on, each still in ascending order."""
    # A stable sort by part of the channels already sorted by score puts each part side by side.
    together = ascending[torch.argsort(part_of_N[ascending], stable=True)]
    parts: tuple[Tensor, ...] = together.split(part_of_N.bincount().tolist())
    return parts


def _group_of(channel: int, sizes: Mapping[str, int]) -> str:
    for name, size in sizes.items():
        if channel < size:
            return name
        channel -= size
    raise AssertionError("a channel beyond the last group")
