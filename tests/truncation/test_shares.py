"""Shares of unequal length: what is reduced and gathered over gloo, and how much is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.handed_over import handed_over
from tests.ranks import Ranks
from worm_dist.comm_hooks import shares as module
from worm_dist.comm_hooks.shares import Shares

_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((7,), (0,)),
    2: ((9, 4), (4, 9), (0, 7), (7, 0), (1, 0), (5, 5), (0, 0)),
    3: ((1, 0, 0), (0, 0, 8), (3, 11, 2), (4, 4, 5)),
    4: ((0, 9, 0, 1), (20, 1, 1, 1), (1, 1, 1, 20), (6, 7, 8, 9)),
}
"""The last of 20 has elements in the chunks of all ranks; the single one leaves chunks without."""


def _reduced_and_gathered(cost: int, dtype: torch.dtype) -> list[str]:
    """What was not as it should be."""
    vars(module)["_BYTES_OF_A_COLLECTIVE"] = cost
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    wrong = []
    for sizes in _SIZES[num_ranks]:
        shares = Shares(sizes, dtype.itemsize, rank)
        # Sums of small whole numbers are exact in any order.
        values = [
            torch.arange(sum(sizes)).remainder(5).add(each).to(dtype) for each in range(num_ranks)
        ]
        memory = torch.full((shares.num_elements,), torch.nan, dtype=dtype)
        for place, value in zip(shares.of_ranks(memory), values[rank].split(sizes), strict=True):
            place.copy_(value)
        shares.clear_padding(memory)
        if bool(memory.isnan().any()):
            wrong.append(f"{sizes}: padding has not been cleared")
        dist.all_reduce(memory)  # a reduce-scatter whose other results are still there
        own = shares.to_owners(shares.chunk(memory), group)
        expected = torch.stack(values).sum(0).split(sizes)[rank]
        if not torch.equal(own, expected):
            wrong.append(f"{sizes}: {own} was reduced, not {expected}")

        received = torch.full((shares.num_elements,), torch.nan, dtype=dtype)
        whole = torch.arange(sum(sizes)).remainder(200).to(dtype).split(sizes)
        shares.all_gather(whole[rank].clone(), received, group).wait()
        for of_rank, expected in zip(shares.of_ranks(received), whole, strict=True):
            if not torch.equal(of_rank, expected):
                wrong.append(f"{sizes}: {of_rank} was gathered, not {expected}")
        right = handed_over(sizes, dtype.itemsize, rank, cost)
        counted = shares.num_reduced, shares.num_gathered
        if counted != (right.mean_reduced, right.mean_gathered):
            wrong.append(f"{sizes}: {counted} elements, not {right}")
    return wrong


@pytest.mark.parametrize(
    ("num_ranks", "cost", "dtype"),
    [
        (1, 0, torch.float32),
        (2, 0, torch.float32),
        (2, 2**15, torch.bfloat16),  # all are padded
        (3, 0, torch.bfloat16),
        (4, 0, torch.float32),
    ],
)
def test_owners_have_sums_and_all_have_shares(
    ranks: Ranks, num_ranks: int, cost: int, dtype: torch.dtype
) -> None:
    assert not any(ranks(num_ranks, _reduced_and_gathered, cost, dtype))


@pytest.mark.parametrize(
    ("sizes", "element_size", "is_padded"),
    [
        ((100, 100), 4, True),
        ((16_384, 1), 4, True),  # chunks of 8193: 4096 elements saved for each rank, half of them
        ((32_769 + 2, 1), 4, False),
        ((32_769 + 2, 1), 2, True),
        ((10**9, 10**9 - 1), 4, True),
        ((10**7, 10**7, 10**7, 5 * 10**6), 4, False),
    ],
)
def test_padding_is_weighed_against_one_more_collective(
    sizes: tuple[int, ...], element_size: int, is_padded: bool
) -> None:
    for shares in (sizes, sizes[::-1]):
        whole = Shares(shares, element_size, 0).num_elements
        assert (whole == len(shares) * max(shares)) == (is_padded or len(set(shares)) == 1)


def test_many_ranks_send_little_more_than_the_mean() -> None:
    """Shares that differ by up to a half: padded, every rank sent a third more than the mean."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1_000_000, 2_000_000, (64,), generator=generator).tolist()
    shares = Shares(sizes, 4, 0)
    assert shares.num_elements - sum(sizes) < 64
    assert shares.num_reduced < 1.02 * sum(sizes) < max(sizes) * 64 / 1.3
