"""Rounding: widths that hardware likes, at the ratio that was asked for.

Matrix units work in blocks of 8 or 16 channels; a layer of 37 takes as long as one of 40.  Each
group goes to a multiple near its own count, up or down, so that together they keep as many channels
as before: the method of the largest remainder, by which parliaments turn votes into seats.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from math import lcm

import torch
from torch import Tensor

from .mask import Mask
from .select import comparable, num_protected

__all__ = ["is_rounded", "ratio_reached", "rounded"]

_BLOCKS_OF_A_ROUNDED_GROUP = 4  # in a smaller one a block is too large a share


def rounded(
    mask: Mask,
    scores: Tensor,
    round_to: int,
    floor: float,
    lost: Tensor | None = None,
    widths: Mapping[str, int] | None = None,
) -> Mask:
    """The mask with counts that are multiples of ``round_to`` in every group of more than four
    blocks; in smaller groups, which are left alone, it would say more than the scores.

    A group keeps a multiple, at least one and what the floor protects, or all of its channels.
    The total is the mask's own up to half a block, and further only where no group can give or take
    another; on a tie fewer are kept.  Blocks move between all groups, also between those that were
    cut apart: what holds is the total, not the count of each pool.  A group whose count changes
    loses its lowest channels or gains the highest of the others; a mask that is rounded already is
    returned as it is.

    Args:
        mask: to round.
        scores: ``[N]`` floats, groups one after another in the order of the mask.
        round_to: channels in a block; 1 changes nothing.
        floor: share of its channels that every group keeps.
        lost: bool ``[N]``, channels that cannot be kept any more, and are not in the mask.  A group
            that they leave no multiple keeps the mask's own count.
        widths: for each group, how many channels of the network one of its channels stands for,
            default one.  Blocks and totals are counted in those; where the width does not divide
            the block, a block is the least common multiple.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
    """
    sizes = mask.sizes
    channels = list(sizes.values())
    lost = torch.zeros_like(mask.keep) if lost is None else lost
    assert not bool((mask.keep & lost).any()), "the mask keeps what is lost"
    widths = dict.fromkeys(sizes, 1) if widths is None else widths
    ladders: dict[str, list[int]] = {}
    own: dict[str, int] = {}
    for (name, kept), gone in zip(mask.items(), lost.split(channels)):
        size, width = kept.numel(), widths[name]
        if is_rounded(size * width, lcm(width, round_to)):
            own[name] = int(kept.sum()) * width
            ladders[name] = [
                count * width
                for count in range(num_protected(floor, size), size - int(gone.sum()) + 1)
                if count * width % round_to == 0 or count == size
            ] or [own[name]]
    near = _largest_remainders(own, ladders)
    changed = {name: near[name] // widths[name] for name in near if near[name] != own[name]}
    if not changed:
        return mask
    parts = dict(zip(sizes, comparable(scores, sizes, lost).split(channels)))
    resized = {name: _resized(mask[name], parts[name], count) for name, count in changed.items()}
    return Mask({name: resized.get(name, kept) for name, kept in mask.items()})


def is_rounded(num_channels: int, block: int) -> bool:
    """Whether a group of so many channels of the network is large enough to be rounded."""
    return num_channels > _BLOCKS_OF_A_ROUNDED_GROUP * block


def ratio_reached(mask: Mask) -> float:
    """The share of all channels that a mask drops, 0 to 1."""
    return (mask.num_channels - mask.num_kept) / mask.num_channels


def _largest_remainders(
    own: Mapping[str, int], ladders: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """For each group the count on its ladder, the sum of all as near to that of ``own`` as it gets.

    Each starts on the rung below its own count.  Then one after another takes a step, whichever is
    furthest from its own count first, the first group of equals, as long as that brings the sum
    nearer.
    """
    rungs = {name: max(0, bisect_right(ladder, own[name]) - 1) for name, ladder in ladders.items()}
    short = {name: own[name] - ladders[name][rung] for name, rung in rungs.items()}
    missing = sum(short.values())
    while missing:
        way = 1 if missing > 0 else -1
        steps = {
            name: ladders[name][rung + way] - ladders[name][rung]
            for name, rung in rungs.items()
            if 0 <= rung + way < len(ladders[name])
        }
        # On a tie fewer are kept.
        able = [
            name
            for name, step in steps.items()
            if abs(missing - step) < abs(missing) or 2 * missing == step < 0
        ]
        if not able:
            break
        furthest = max(able, key=lambda name: way * short[name])
        rungs[furthest] += way
        short[furthest] -= steps[furthest]
        missing -= steps[furthest]
    return {name: ladders[name][rung] for name, rung in rungs.items()}


def _resized(kept: Tensor, scores: Tensor, count: int) -> Tensor:
    """bool ``[channels]``: what is kept loses its lowest, or gains the highest of the others; of
    equal scores the earlier channels go first, as in the cut."""
    ascending = scores.argsort(stable=True)
    ascending = ascending[kept[ascending].int().argsort(stable=True)]
    resized = torch.zeros_like(kept)
    resized[ascending[kept.numel() - count :]] = True
    return resized
