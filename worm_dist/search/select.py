"""Selection: computes from scores the mask that drops the lowest channels, up to a count, a
threshold or a cost.

The order of the channels is total: by score, then by group, then by channel.  So ties are resolved
in the same way on all ranks and in all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..groups.mask import Mask
from ..ratio import exact
from .budgets import Budget, Pool

__all__ = ["comparable", "not_empty", "num_protected", "quantiles", "select_channels"]


def select_channels(
    scores: Tensor,
    sizes: Mapping[str, int],
    pools: float | Sequence[Pool | Budget],
    floor: float,
    irreversible: Tensor | None = None,
    selection: Literal["count", "above", "quantile"] = "count",
) -> tuple[Mask, tuple[str, ...]]:
    """Drop the lowest channels of each pool that the floor does not protect: ``int(ratio *
    channels)``, or the fewest that meet a budget.

    In every group the best ``max(1, ceil(floor * channels))`` are protected; other groups of the
    pool lose more channels instead, so that the pool's count or cost stays exact.

    The published rules have a threshold in the place of a count: with ``above`` the score of
    position ``int(ratio * channels)`` in ascending order, from 0 on (Early-Bird, arXiv 1909.11957),
    with ``quantile`` the ratio's quantile (EarlyBERT, arXiv 2101.00063).  What is not strictly
    above it is dropped, so one channel more, and more where scores are equal.  Without a floor
    nothing is protected then: a group may lose all channels.

    Args:
        scores: ``[N]`` floats, the scores of all groups in the order of ``sizes``.
        sizes: the number of channels of each group.
        pools: the pools, a partition of the groups in any order; a budget is a pool of all groups,
            and a float is the ratio of a single one.
        floor: the share of its channels that every group keeps at least.
        irreversible: bool ``[N]``, channels that cannot be kept any more; they are dropped first,
            even if they exceed what is asked for.
        selection: ``count``, ``above`` or ``quantile``; with a budget ``count``.

    Returns:
        The mask, and the names of the groups in which the floor kept a channel.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
        ConfigError: the floors leave fewer channels than have to be dropped.
    """
    if not isinstance(pools, Sequence):
        pools = (Pool(pools, tuple(sizes)),)
    pool_of = {name: number for number, pool in enumerate(pools) for name in pool.groups}
    num_pooled = sum(len(pool.groups) for pool in pools)
    assert pool_of.keys() == sizes.keys() and num_pooled == len(sizes), "not a partition"
    irreversible = (
        torch.zeros(scores.numel(), dtype=torch.bool) if irreversible is None else irreversible
    )
    channels = torch.tensor(list(sizes.values()))
    group_of_N = torch.arange(len(sizes)).repeat_interleave(channels)
    pool_of_N = torch.tensor([pool_of[name] for name in sizes]).repeat_interleave(channels)
    compared = comparable(scores, sizes, irreversible)
    ascending = compared.argsort(stable=True)

    protected = torch.zeros_like(irreversible)
    least = 1 if selection == "count" else 0
    for group in _split(ascending, group_of_N):
        protected[group[group.numel() - num_protected(floor, group.numel(), least) :]] = True
    protected &= ~irreversible
    keep = torch.ones_like(irreversible)
    spared = torch.zeros_like(irreversible)
    for pool, members in zip(pools, _split(ascending, pool_of_N)):
        if selection != "count":
            assert isinstance(pool, Pool), "a budget has no threshold"
            threshold = compared[members[pool.position(selection, members.numel())]]
            lowest = members[compared[members] <= threshold]
            keep[lowest[~protected[lowest]]] = False
            spared[lowest] = protected[lowest]
            continue
        droppable = members[~protected[members]]
        num_dropped = max(
            pool.prefix(droppable, members.numel(), floor), int(irreversible[members].sum())
        )
        keep[droppable[:num_dropped]] = False
        lowest = members[:num_dropped]
        spared[lowest] = protected[lowest]

    names = list(sizes)
    floored = tuple(names[group] for group in group_of_N[spared].unique().tolist())
    return Mask.from_vector(sizes, keep), floored


def not_empty(mask: Mask, scores: Tensor) -> tuple[Mask, tuple[str, ...]]:
    """Keep the best channel of every group of which a mask keeps none, and name these groups.

    Args:
        mask: the mask.
        scores: ``[N]`` floats, the scores of its channels, in its order.
    """
    empty = [name for name, kept in mask.items() if not bool(kept.any())]
    if not empty:
        return mask, ()
    parts = dict(zip(mask, scores.detach().cpu().split(list(mask.sizes.values()))))
    # Of equal channels the last, as everywhere.
    best = {name: parts[name].argsort(stable=True)[-1:] for name in empty}
    kept = dict(mask.items())
    for name, channel in best.items():
        kept[name][channel] = True
    return Mask(kept), tuple(empty)


def comparable(scores: Tensor, sizes: Mapping[str, int], irreversible: Tensor) -> Tensor:
    """Return the scores as float64 ``[N]`` on the CPU, minus infinity for irreversible channels.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
    """
    scores = scores.detach().cpu().double()
    finite = scores.isfinite()
    if not bool(finite.all()):
        group = _group_at(int((~finite).nonzero()[0]), sizes)
        raise NonFiniteError(
            f"group {group}: its scores are not finite; the weights diverged, lower the "
            "learning rate"
        )
    return scores.masked_fill(irreversible, -torch.inf)


def quantiles(scores: Tensor, sizes: Mapping[str, int], irreversible: Tensor) -> Tensor:
    """Return the rank of every channel within its group as scores, float64 ``[N]``, between 0 for
    the lowest and 1 for the highest.  In their order all groups lose about the same share.

    Args:
        scores, sizes, irreversible: as in ``select_channels``.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
    """
    ranked = comparable(scores, sizes, irreversible).split(list(sizes.values()))
    ranks = [group.argsort(stable=True).argsort() for group in ranked]
    return torch.cat([(rank.double() + 0.5) / rank.numel() for rank in ranks])


def num_protected(floor: float, size: int, least: int = 1) -> int:
    """Return how many of a group's ``size`` channels the floor protects, at least ``least``."""
    return max(least, ceil(exact(floor) * size))


def _split(ascending: Tensor, part_of_N: Tensor) -> tuple[Tensor, ...]:
    """Split channel indices, sorted by score, by part number; the order within parts is kept."""
    together = ascending[torch.argsort(part_of_N[ascending], stable=True)]
    parts: tuple[Tensor, ...] = together.split(part_of_N.bincount().tolist())
    return parts


def _group_at(channel: int, sizes: Mapping[str, int]) -> str:
    for name, size in sizes.items():
        if channel < size:
            return name
        channel -= size
    raise AssertionError("a channel beyond the last group")
