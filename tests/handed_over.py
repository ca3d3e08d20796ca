"""Handed over: how many elements a rank gives to collectives of unequal shares, counted singly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["BYTES_OF_A_COLLECTIVE", "HandedOver", "handed_over", "num_exchanged"]

BYTES_OF_A_COLLECTIVE = 2**15
"""Where padding is not more than this for each rank, it is sent."""


class HandedOver(NamedTuple):
    """Numbers of elements.

    Attributes:
        reduced, gathered: that a rank hands over to reduce all shares, and to gather them.
        mean_reduced, mean_gathered: averaged over the ranks.
    """

    reduced: int
    gathered: int
    mean_reduced: int
    mean_gathered: int


def handed_over(
    shares: Sequence[int], element_size: int, rank: int, cost: int = BYTES_OF_A_COLLECTIVE
) -> HandedOver:
    """Of one rank.

    Args:
        shares: number of elements of each rank's.
        element_size: bytes of an element.
        rank: the rank.
        cost: bytes that are not worth another collective.
    """
    num_ranks, total = len(shares), sum(shares)
    chunk = -(-total // num_ranks)
    owners = torch.repeat_interleave(torch.arange(num_ranks), torch.tensor(shares))
    holders = torch.arange(total) // max(chunk, 1)
    is_moved = owners != holders
    moved_by_each = int(is_moved.sum()) // num_ranks
    saved = (num_ranks - 1) * (max(shares) - chunk) - moved_by_each
    if saved * element_size <= cost:
        chunk, moved_by_each, is_moved = max(shares), 0, is_moved & False
    found = HandedOver(
        num_ranks * chunk + int((is_moved & (holders == rank)).sum()),
        chunk + int((is_moved & (owners == rank)).sum()),
        num_ranks * chunk + moved_by_each,
        chunk + moved_by_each,
    )
    if num_ranks == 2:  # each tells the other one its share
        return found._replace(gathered=shares[rank], mean_gathered=total // 2)
    return found


def num_exchanged(rank: int, splits: Sequence[int]) -> int:
    """Number of elements that an all-to-all sends to other ranks."""
    return sum(splits) - splits[rank]
