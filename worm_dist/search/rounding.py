"""Rounding: group widths that are efficient on hardware, at the requested pruning ratio.

Matrix units work in blocks of 8 or 16 channels; a layer of 37 takes as long as one of 40.  Each
group is rounded up or down to a multiple near its count, such that the total stays the same: the
largest remainder method.  With a budget the total is the cost, which is met from below.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from math import lcm

import torch
from torch import Tensor

from ..groups.mask import Mask
from .budgets import Budget
from .select import comparable, num_protected

__all__ = ["is_rounded", "ratio_reached", "rounded"]

_MAX_BLOCKS_OF_AN_UNROUNDED_GROUP = 4  # a block would be too large a share of so few


def rounded(
    mask: Mask,
    scores: Tensor,
    round_to: int,
    floor: float,
    irreversible: Tensor | None = None,
    widths: Mapping[str, int] | None = None,
    budget: Budget | None = None,
) -> Mask:
    """Round the kept counts to multiples of ``round_to`` in every group of more than four blocks.

    Smaller groups are unchanged, since rounding would outweigh their scores.  A rounded group keeps
    all of its channels or a multiple, at least one channel and what the floor protects.  The total
    changes by at most half a block, or more only if no group can change by another block; on a tie
    fewer channels are kept.  Blocks move between all groups, also between pools: the total is
    preserved, not the count of each pool.  A group whose count changes loses its lowest-scoring
    channels or gains the highest-scoring dropped ones.  A mask that is already rounded is returned.

    With a budget the cost takes the place of the total: it stays within the budget, and no group
    can keep another block.  If no multiples meet it, because of floors, the mask is returned.

    Args:
        mask: the mask to round.
        scores: ``[N]`` floats, the scores of all groups in the order of the mask.
        round_to: the number of channels in a block; 1 changes nothing.
        floor: the share of its channels that every group keeps at least.
        irreversible: bool ``[N]``, channels that cannot be kept any more and are not in the mask.
            A group that has no possible multiple without them keeps the mask's count.
        widths: the number of network channels that one channel of each group stands for, default
            one.  Blocks and totals are counted in network channels; if the width does not divide
            the block, the block is the least common multiple.
        budget: the budget that the mask meets, or None.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the group.
    """
    sizes = mask.sizes
    channels = list(sizes.values())
    irreversible = torch.zeros_like(mask.keep) if irreversible is None else irreversible
    assert not bool((mask.keep & irreversible).any()), "the mask keeps what is irreversible"
    widths = dict.fromkeys(sizes, 1) if widths is None else widths
    allowed_counts: dict[str, list[int]] = {}
    current: dict[str, int] = {}
    for (name, kept), gone in zip(mask.items(), irreversible.split(channels)):
        size, width = kept.numel(), widths[name]
        if is_rounded(size * width, lcm(width, round_to)):
            current[name] = int(kept.sum()) * width
            allowed_counts[name] = [
                count * width
                for count in range(num_protected(floor, size), size - int(gone.sum()) + 1)
                if count * width % round_to == 0 or count == size
            ] or [current[name]]
    if budget is None:
        near = _largest_remainders(current, allowed_counts)
    else:
        num_kept = dict(zip(sizes, mask.num_kept_by_group.tolist()))

        def is_met(counts: Mapping[str, int]) -> bool:
            resized = {name: count // widths[name] for name, count in counts.items()}
            return budget.is_met(torch.tensor(list({**num_kept, **resized}.values())))

        near = _most_within(current, allowed_counts, is_met)
    changed = {name: near[name] // widths[name] for name in near if near[name] != current[name]}
    if not changed:
        return mask
    parts = dict(zip(sizes, comparable(scores, sizes, irreversible).split(channels)))
    resized = {name: _resized(mask[name], parts[name], count) for name, count in changed.items()}
    return Mask({name: resized.get(name, kept) for name, kept in mask.items()})


def is_rounded(num_channels: int, block: int) -> bool:
    """Whether a group with ``num_channels`` network channels is large enough to be rounded."""
    return num_channels > _MAX_BLOCKS_OF_AN_UNROUNDED_GROUP * block


def ratio_reached(mask: Mask) -> float:
    """Return the share of all channels that a mask drops, 0 to 1."""
    return (mask.num_channels - mask.num_kept) / mask.num_channels


def _largest_remainders(
    current: Mapping[str, int], allowed_counts: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Choose an allowed count for each group such that their sum is nearest to that of ``current``.

    Each group starts at the largest allowed count that does not exceed its current one.  Then, as
    long as the sum gets nearer, the group furthest from its current count moves to the next allowed
    count; of equally distant groups the first one.

    Args:
        current: the current count of each group, in network channels.
        allowed_counts: the allowed counts of each group, ascending.
    """
    positions = _positions_below(current, allowed_counts)
    shortfall = {
        name: current[name] - allowed_counts[name][position] for name, position in positions.items()
    }
    missing = sum(shortfall.values())
    while missing:
        direction = 1 if missing > 0 else -1
        steps = {
            name: allowed_counts[name][position + direction] - allowed_counts[name][position]
            for name, position in positions.items()
            if 0 <= position + direction < len(allowed_counts[name])
        }
        # On a tie fewer are kept.
        candidates = [
            name
            for name, step in steps.items()
            if abs(missing - step) < abs(missing) or 2 * missing == step < 0
        ]
        if not candidates:
            break
        furthest = max(candidates, key=lambda name: direction * shortfall[name])
        positions[furthest] += direction
        shortfall[furthest] -= steps[furthest]
        missing -= steps[furthest]
    return {name: allowed_counts[name][position] for name, position in positions.items()}


def _most_within(
    current: Mapping[str, int],
    allowed_counts: Mapping[str, Sequence[int]],
    is_met: Callable[[Mapping[str, int]], bool],
) -> dict[str, int]:
    """Choose an allowed count for each group such that the budget is met, and no group can move to
    the next allowed count.

    Each group starts as in ``_largest_remainders``.  As long as the budget is exceeded, because of
    groups whose least allowed count is above their current one, the group furthest above or least
    below its current count moves to the allowed count below.  Then the group furthest below its
    current count moves to the next allowed count, or stays if that exceeds the budget; and so on.
    Of equally distant groups the first one moves.

    Args:
        current: the current count of each group, in network channels; they meet the budget.
        allowed_counts: the allowed counts of each group, ascending.
        is_met: whether such counts meet the budget; if they do, lower ones do.
    """
    positions = _positions_below(current, allowed_counts)

    def counts_at(positions: Mapping[str, int]) -> dict[str, int]:
        return {name: allowed_counts[name][position] for name, position in positions.items()}

    def shortfall(name: str) -> int:
        return current[name] - allowed_counts[name][positions[name]]

    while not is_met(counts_at(positions)):
        lowerable = [name for name, position in positions.items() if position > 0]
        if not lowerable:
            return dict(current)
        positions[min(lowerable, key=shortfall)] -= 1
    growing = list(positions)
    while growing:
        name = max(growing, key=shortfall)
        above = {**positions, name: positions[name] + 1}
        if above[name] < len(allowed_counts[name]) and is_met(counts_at(above)):
            positions = above
        else:  # what exceeds the budget now does so when other groups have grown
            growing.remove(name)
    return counts_at(positions)


def _positions_below(
    current: Mapping[str, int], allowed_counts: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Return the position of the largest allowed count that does not exceed the current one, or of
    the least."""
    return {
        name: max(0, bisect_right(allowed, current[name]) - 1)
        for name, allowed in allowed_counts.items()
    }


def _resized(kept: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the keep flags, bool ``[channels]``, of a group that keeps ``count`` channels.

    Kept channels with the lowest scores are dropped, or dropped ones with the highest scores are
    kept; of equal scores the earlier channels are dropped first, as in ``select_channels``.
    """
    ascending = scores.argsort(stable=True)
    ascending = ascending[kept[ascending].int().argsort(stable=True)]
    resized = torch.zeros_like(kept)
    resized[ascending[kept.numel() - count :]] = True
    return resized
