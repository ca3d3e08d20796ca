"""Cut: from scores to the mask that drops exactly the share p.

The order of the channels is total: by score, then by group, then by channel.  No tie can fall
differently on two ranks or in two runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError
from .mask import Mask

__all__ = ["cut"]


def cut(
    scores: Tensor,
    sizes: Mapping[str, int],
    prune_ratio: float,
    floor: float,
    lost: Tensor | None = None,
) -> tuple[Mask, tuple[str, ...]]:
    """Drop the ``int(prune_ratio * N)`` lowest channels that the floor does not protect.

    In every group the best ``max(1, ceil(floor * channels))`` are protected; what they are spared
    is taken from the other groups, so the global count stays exact.

    Args:
        scores: ``[N]`` floats, groups one after another in the order of ``sizes``.
        sizes: channels of each group.
        prune_ratio: share p of all N channels to drop.
        floor: share of its channels that every group keeps.
        lost: bool ``[N]``, channels that cannot be kept any more; they are dropped first.

    Returns:
        The mask, and the names of the groups in which the floor spared a channel.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
        ConfigError: the floors leave fewer channels than have to be dropped.
    """
    scores = scores.detach().cpu().double()
    finite = scores.isfinite()
    if not bool(finite.all()):
        group = _group_of(int((~finite).nonzero()[0]), sizes)
        raise NonFiniteError(
            f"group {group}: its scores are not finite; the weights diverged, lower the "
            "learning rate"
        )
    if lost is not None:
        scores = scores.masked_fill(lost, -torch.inf)
    group_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes.values())))
    ascending = torch.argsort(scores, stable=True)

    protected = _best_of_each_group(ascending, group_of, sizes, floor)
    if lost is not None:
        protected &= ~lost
    num_dropped = int(round(prune_ratio * scores.numel(), 9))
    if lost is not None:
        num_dropped = max(num_dropped, int(lost.sum()))
    free = ascending[~protected[ascending]]
    if free.numel() < num_dropped:
        raise ConfigError(
            f"search.floor: {floor:g} protects so many channels that only {free.numel()} of "
            f"{scores.numel()} may be dropped, but prune_ratio {prune_ratio:g} asks for "
            f"{num_dropped}; lower one of them"
        )
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[free[:num_dropped]] = False

    spared = protected[ascending[:num_dropped]]
    floored = group_of[ascending[:num_dropped][spared]].unique().tolist()
    names = list(sizes)
    return Mask.from_vector(sizes, keep), tuple(names[g] for g in floored)


def _best_of_each_group(
    ascending: Tensor, group_of: Tensor, sizes: Mapping[str, int], floor: float
) -> Tensor:
    """bool ``[N]``: the channels that the floor keeps."""
    # A stable sort by group of the channels already sorted by score puts each group's channels
    # side by side, its best last.
    by_group = ascending[torch.argsort(group_of[ascending], stable=True)]
    protected = torch.zeros_like(by_group, dtype=torch.bool)
    end = 0
    for size in sizes.values():
        end += size
        # Rounded, or 0.07 of 100 channels, 7.000000000000001 in floats, would be 8.
        num_protected = max(1, ceil(round(floor * size, 9)))
        protected[by_group[end - num_protected : end]] = True
    return protected


def _group_of(channel: int, sizes: Mapping[str, int]) -> str:
    for name, size in sizes.items():
        if channel < size:
            return name
        channel -= size
    raise AssertionError("a channel beyond the last group")
