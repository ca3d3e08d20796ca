from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import ceil, lcm
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from worm_dist import ConfigError, Mask, NonFiniteError
from worm_dist.search.budgets import pools_of
from worm_dist.search.rounding import ratio_reached, rounded
from worm_dist.search.select import select_channels

Case = tuple[Mask, Tensor, int, float, Tensor, dict[str, int]]


@st.composite
def _cases(draw: st.DrawFn, most_groups: int = 4) -> Case:
    """A mask as the cut makes it, with ties, floors, lost channels, and channels of any width."""
    size = st.integers(1, 24) | st.integers(13, 24)  # often large enough to be rounded
    channels = draw(st.lists(size, min_size=1, max_size=most_groups))
    sizes = {f"group{number}": size for number, size in enumerate(channels)}
    scores = torch.tensor([draw(st.integers(0, 9)) for _ in range(sum(channels))]).float()
    some = draw(st.sampled_from([0, 0.3]))
    lost = torch.tensor([draw(st.floats(0, 1)) < some for _ in range(sum(channels))])
    ratio, floor = draw(st.sampled_from([0, 0.3, 0.5, 0.8])), draw(st.sampled_from([0, 0.2, 0.4]))
    widths = {name: draw(st.sampled_from([1, 1, 2, 3])) for name in sizes}
    try:
        mask, _ = select_channels(scores, sizes, ratio, floor, lost)
    except ConfigError:
        assume(False)
    return mask, scores, draw(st.sampled_from([2, 3, 4])), floor, lost, widths


def _allowed(case: Case) -> dict[str, list[int]]:
    """In plain Python, the counts that each group may have."""
    mask, _, round_to, floor, lost, widths = case
    allowed = {}
    gone = dict(zip(mask, lost.split(list(mask.sizes.values()))))
    for name, size in mask.sizes.items():
        kept, most = int(mask[name].sum()), size - int(gone[name].sum())
        fewest = max(1, ceil(Fraction(str(floor)) * size))
        counts = [
            count
            for count in range(fewest, most + 1)
            if count * widths[name] >= round_to
            and (count * widths[name] % round_to == 0 or count == size)
        ]
        large = size * widths[name] > 4 * lcm(widths[name], round_to)
        allowed[name] = counts if large and counts else [kept]
    return allowed


def _counts(mask: Mask) -> dict[str, int]:
    return {name: int(kept.sum()) for name, kept in mask.items()}


def _num_kept(counts: dict[str, int], widths: dict[str, int]) -> int:
    return sum(count * widths[name] for name, count in counts.items())


@given(_cases())
def test_the_total_stays_and_every_count_is_allowed(case: Case) -> None:
    """Among all totals that the allowed counts can make none is nearer, beyond half a step."""
    mask, scores, round_to, floor, lost, widths = case
    allowed, before = _allowed(case), _num_kept(_counts(mask), widths)
    after = _counts(rounded(mask, scores, round_to, floor, lost, widths))
    assert all(after[name] in allowed[name] for name in mask)
    off = abs(_num_kept(after, widths) - before)
    totals = {0}
    for name, counts in allowed.items():
        totals = {total + count * widths[name] for total in totals for count in counts}
    nearest = min(abs(total - before) for total in totals)
    steps = {
        (high - low) * widths[name]
        for name, ladder in allowed.items()
        for low, high in pairwise(ladder)
    }
    if len(steps) < 2:
        assert off == nearest
    else:
        assert off <= max(nearest, max(steps) / 2)


@settings(max_examples=50)
@given(_cases())
def test_kept_are_the_best_that_are_not_lost_and_the_rest_is_untouched(case: Case) -> None:
    mask, scores, round_to, floor, lost, widths = case
    result = rounded(mask, scores, round_to, floor, lost, widths)
    channels = list(mask.sizes.values())
    for name, part, gone in zip(mask, scores.split(channels), lost.split(channels)):
        count = int(result[name].sum())
        if count == int(mask[name].sum()):
            assert torch.equal(result[name], mask[name])
        ranked = sorted(
            (score, channel)
            for channel, (score, dead) in enumerate(zip(part.tolist(), gone.tolist()))
            if not dead
        )
        best = {channel for _, channel in ranked[len(ranked) - count :]}
        assert result[name].tolist() == [c in best for c in range(mask.sizes[name])]


@settings(max_examples=30)
@given(_cases(most_groups=8))
def test_rounded_once_is_rounded(case: Case) -> None:
    mask, scores, round_to, floor, lost, widths = case
    once = rounded(mask, scores, round_to, floor, lost, widths)
    assert rounded(once, scores, round_to, floor, lost, widths) is once


@settings(max_examples=20)
@given(_cases())
def test_blocks_of_one_leave_the_mask_as_it_is(case: Case) -> None:
    mask, scores, _, floor, lost, _ = case
    assert rounded(mask, scores, 1, floor, lost) is mask


@given(st.lists(st.integers(4, 20), min_size=1, max_size=8))
def test_the_largest_remainders_take_the_blocks(kept: list[int]) -> None:
    """Sizes that are multiples, nothing lost, no floor: the textbook's rule, word for word."""
    sizes = {f"group{number}": 20 for number in range(len(kept))}
    scores = torch.arange(20.0 * len(kept))
    mask = Mask({name: torch.arange(20) >= 20 - n for name, n in zip(sizes, kept)})
    quotas = [Fraction(n, 4) for n in kept]
    num_blocks = ceil(sum(quotas) - Fraction(1, 2))
    seats = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(kept)), key=lambda g: (seats[g] - quotas[g], g))
    for group in by_remainder[: num_blocks - sum(seats)]:
        seats[group] += 1
    result = rounded(mask, scores, 4, 0.0)
    assert list(_counts(result).values()) == [4 * blocks for blocks in seats]


@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.sampled_from([0.3, 0.5, 0.7]))
def test_a_rounded_mask_stays_when_what_it_drops_is_lost(random: Any, ratio: float) -> None:
    """The next check cuts exactly again, without what has begun to fade, and rounds again."""
    sizes = {f"group{number}": random.randint(33, 90) for number in range(6)}
    num_channels = sum(sizes.values())
    scores = torch.tensor(random.sample(range(num_channels), num_channels)).float()
    first = rounded(select_channels(scores, sizes, ratio, 0.1)[0], scores, 8, 0.1)
    lost = ~first.keep
    again, _ = select_channels(scores, sizes, ratio, 0.1, lost)
    assert rounded(again, scores, 8, 0.1, lost) == first


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_where_scores_differ_the_order_of_channels_means_nothing(random: Any) -> None:
    sizes = {"a": 24, "b": 30}
    scores = torch.tensor(random.sample(range(54), 54)).float()
    order = torch.tensor(
        random.sample(range(24), 24) + [24 + c for c in random.sample(range(30), 30)]
    )
    straight = rounded(select_channels(scores, sizes, 0.5, 0.1)[0], scores, 4, 0.1)
    shuffled = rounded(select_channels(scores[order], sizes, 0.5, 0.1)[0], scores[order], 4, 0.1)
    assert torch.equal(shuffled.keep, straight.keep[order])


def _mask(**kept: tuple[int, int]) -> tuple[Mask, Tensor]:
    """Keeps the last so many of so many channels, scores ascending."""
    mask = Mask({name: torch.arange(size) >= size - count for name, (count, size) in kept.items()})
    return mask, torch.arange(float(mask.num_channels))


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({"a": (37, 64)}, {"a": 40}),
        ({"a": (35, 64)}, {"a": 32}),
        ({"a": (36, 64)}, {"a": 32}),  # a tie: fewer
        ({"a": (36, 64), "b": (36, 64)}, {"a": 40, "b": 32}),  # a tie: the first
        ({"a": (35, 64), "b": (37, 64)}, {"a": 32, "b": 40}),
        ({"a": (40, 64), "b": (17, 32)}, {"a": 40, "b": 17}),  # 32 channels are too few to round
        ({"a": (40, 64), "b": (17, 33)}, {"a": 40, "b": 16}),
        ({"a": (99, 100)}, {"a": 100}),  # the whole group is allowed
        ({"a": (98, 100), "b": (90, 100)}, {"a": 100, "b": 88}),
        ({"a": (3, 64), "b": (40, 64)}, {"a": 8, "b": 32}),  # another gives what the first must get
        ({"a": (4, 64), "b": (40, 64)}, {"a": 8, "b": 32}),  # a tie again
        ({"a": (5, 64), "b": (40, 64)}, {"a": 8, "b": 40}),
        ({"a": (1, 64), "b": (42, 64), "c": (40, 64)}, {"a": 8, "b": 40, "c": 32}),  # b gave two
    ],
)
def test_by_hand(kept: dict[str, tuple[int, int]], expected: dict[str, int]) -> None:
    mask, scores = _mask(**kept)
    assert _counts(rounded(mask, scores, 8, 0.0)) == expected


def test_a_group_never_goes_below_its_floor() -> None:
    """0.3 of 64 are 20 channels, so 24; without the floor it is 16."""
    mask, scores = _mask(a=(20, 64))
    assert _counts(rounded(mask, scores, 8, 0.0)) == {"a": 16}
    assert _counts(rounded(mask, scores, 8, 0.3)) == {"a": 24}


@pytest.mark.parametrize(
    ("kept", "alive", "floor", "expected"),
    [
        (39, 39, 0.1, 32),  # 40 cannot be had any more
        (37, 40, 0.1, 40),
        (15, 15, 0.2, 15),  # 16 is out of reach and 8 below the floor
        (5, 5, 0.1, 5),
    ],
)
def test_lost_channels_are_not_brought_back(
    kept: int, alive: int, floor: float, expected: int
) -> None:
    """The lost ones have the highest scores here."""
    mask = Mask({"a": torch.arange(64).ge(alive - kept) & torch.arange(64).lt(alive)})
    lost = torch.arange(64) >= alive
    result = rounded(mask, torch.arange(64.0), 8, floor, lost)
    assert result.num_kept == expected
    assert not bool((result.keep & lost).any())


@pytest.mark.parametrize(("kept", "expected"), [(35, 32), (37, 40)])
def test_a_mask_that_is_not_of_the_best_changes_no_more_than_it_must(
    kept: int, expected: int
) -> None:
    """Here it keeps the lowest: the lowest of them go, the highest of the others come."""
    mask = Mask({"a": torch.arange(64) < kept})
    result = rounded(mask, torch.arange(64.0), 8, 0.1)
    assert result.num_kept == expected
    changed = (result.keep ^ mask.keep).nonzero().flatten().tolist()
    assert changed == ([0, 1, 2] if expected < kept else [61, 62, 63])


def test_blocks_are_counted_in_channels_of_the_network() -> None:
    """13 heads of 12 channels are 156; whole heads make a multiple of 8 only in pairs."""
    mask, scores = _mask(heads=(13, 16))
    assert _counts(rounded(mask, scores, 8, 0.0, widths={"heads": 12})) == {"heads": 12}
    assert _counts(rounded(mask, scores, 4, 0.0, widths={"heads": 12})) == {"heads": 13}


def test_a_group_of_a_few_wide_units_is_left_alone() -> None:
    """Convolutions in groups of eight, 56 channels wide: a unit is seven of them, and a multiple of
    eight only all of them.  Rounding kept those whole, and took what was missing from others."""
    mask, scores = _mask(grouped=(4, 8), other=(32, 64))
    result = rounded(mask, scores, 8, 0.0, widths={"grouped": 7, "other": 1})
    assert _counts(result) == {"grouped": 4, "other": 32}


def test_blocks_move_between_layers_that_were_cut_apart() -> None:
    """The total is as near as blocks of 8 come to 108; each layer by itself would go to 32."""
    sizes = {"a": 64, "b": 64, "c": 64}
    scores = torch.rand(192, generator=torch.Generator().manual_seed(0))
    mask, _ = select_channels(scores, sizes, pools_of(sizes, 0.45, "layer", {}), 0.1)
    assert _counts(mask) == {"a": 36, "b": 36, "c": 36}
    result = rounded(mask, scores, 8, 0.1)
    assert _counts(result) == {"a": 40, "b": 32, "c": 32}
    assert ratio_reached(mask) == 84 / 192
    assert ratio_reached(result) == 88 / 192


def test_scores_that_are_not_finite_name_their_group() -> None:
    """NaN sorts as the highest score: such a channel would be kept."""
    mask, scores = _mask(a=(37, 64), b=(37, 64))
    scores[70] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^group b: "):
        rounded(mask, scores, 8, 0.1)


def test_what_is_given_is_left_alone() -> None:
    mask, scores = _mask(a=(37, 64))
    digest, before, lost = mask.digest, scores.clone(), torch.arange(64) < 5
    assert rounded(mask, scores, 8, 0.1, lost) != mask
    assert Mask(dict(mask)).digest == digest
    assert torch.equal(scores, before)
    assert torch.equal(lost, torch.arange(64) < 5)
