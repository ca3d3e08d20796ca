from __future__ import annotations

from fractions import Fraction
from math import ceil
from math import floor as floor_of

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from worm_dist import ConfigError, NonFiniteError
from worm_dist.search.cut import cut

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(
    lambda sizes: {f"group{number}": size for number, size in enumerate(sizes)}
)
RATIOS = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9])


@st.composite
def _cases(draw: st.DrawFn) -> tuple[dict[str, int], Tensor, float, float]:
    """Sizes, scores with heavy ties, a ratio and a floor."""
    sizes = draw(SIZES)
    num_channels = sum(sizes.values())
    levels = draw(st.lists(st.integers(0, 3), min_size=num_channels, max_size=num_channels))
    return sizes, torch.tensor(levels).float(), draw(RATIOS), draw(st.sampled_from([0, 0.1, 0.3]))


def _num_dropped(ratio: float, num_channels: int) -> int:
    """Rounded down as in decimals, not as in binary fractions."""
    return floor_of(Fraction(str(ratio)) * num_channels)


def _num_protected(floor: float, size: int) -> int:
    return max(1, ceil(Fraction(str(floor)) * size))


def _feasible(sizes: dict[str, int], ratio: float, floor: float) -> bool:
    protected = sum(_num_protected(floor, size) for size in sizes.values())
    return _num_dropped(ratio, sum(sizes.values())) <= sum(sizes.values()) - protected


@given(_cases())
def test_count_is_exact_and_floor_is_respected(case: tuple) -> None:
    sizes, scores, ratio, floor = case
    assume(_feasible(sizes, ratio, floor))
    mask, _ = cut(scores, sizes, ratio, floor)
    assert scores.numel() - mask.num_kept == _num_dropped(ratio, scores.numel())
    for name, size in sizes.items():
        assert int(mask[name].sum()) >= _num_protected(floor, size)


@given(_cases())
def test_order_is_total_by_score_then_group_then_channel(case: tuple) -> None:
    """An oracle in plain Python: walk up the sorted channels, skip what the floor protects."""
    sizes, scores, ratio, floor = case
    assume(_feasible(sizes, ratio, floor))
    channels = [(group, c) for group, size in enumerate(sizes.values()) for c in range(size)]
    ranked = sorted(zip(scores.tolist(), channels))
    protected = set()
    for group, size in enumerate(sizes.values()):
        here = [channel for _, channel in ranked if channel[0] == group]
        protected |= set(here[-_num_protected(floor, size) :])
    num_dropped = _num_dropped(ratio, len(channels))
    free = [channel for _, channel in ranked if channel not in protected]
    dropped = set(free[:num_dropped])

    mask, floored = cut(scores, sizes, ratio, floor)
    assert mask.keep.tolist() == [channel not in dropped for channel in channels]

    without_floor = {channel for _, channel in ranked[:num_dropped]}
    names = list(sizes)
    assert floored == tuple(names[g] for g in sorted({g for g, _ in without_floor - dropped}))


@given(st.integers(0, 2**32), RATIOS)
def test_is_the_published_rule_where_scores_differ_and_no_floor_binds(
    seed: int, ratio: float
) -> None:
    """Early-Bird: threshold = sorted(all |gamma|)[int(N * p)], keep what is strictly greater.

    Strictly greater drops the channel at the threshold too, so the rule drops int(N * p) + 1
    channels; at-least drops int(N * p).  The share p is meant, so the count is the latter.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 16, "b": 24, "c": 8}
    scores = torch.randperm(48, generator=generator).float() / 48
    threshold = scores.sort().values[int(48 * ratio)]
    published = scores >= threshold
    assume(all(bool(part.any()) for part in published.split(list(sizes.values()))))
    mask, floored = cut(scores, sizes, ratio, 0)
    assert torch.equal(mask.keep, published)
    assert floored == ()


@given(_cases(), st.data())
def test_lost_channels_are_dropped_whatever_their_score(case: tuple, data: st.DataObject) -> None:
    sizes, scores, ratio, floor = case
    flags = data.draw(
        st.lists(st.booleans(), min_size=scores.numel(), max_size=scores.numel()), label="lost"
    )
    lost = torch.tensor(flags)
    try:
        mask, _ = cut(scores, sizes, ratio, floor, lost)
    except ConfigError:
        assume(False)
    assert not bool((mask.keep & lost).any())
    num_dropped = scores.numel() - mask.num_kept
    assert num_dropped == max(_num_dropped(ratio, scores.numel()), int(lost.sum()))


@given(_cases())
def test_scores_of_any_scale_give_the_same_mask(case: tuple) -> None:
    sizes, scores, ratio, floor = case
    assume(_feasible(sizes, ratio, floor))
    assert cut(scores, sizes, ratio, floor) == cut(scores * 2.0**-20, sizes, ratio, floor)


def test_floor_spares_the_best_of_a_weak_group_and_takes_from_the_others() -> None:
    sizes = {"weak": 4, "strong": 4}
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0])
    mask, floored = cut(scores, sizes, 0.5, 0.25)
    assert mask.keep.tolist() == [False, False, False, True, False, True, True, True]
    assert floored == ("weak",)


def test_a_floor_that_does_not_bind_is_not_named() -> None:
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8])
    assert cut(scores, {"a": 2, "b": 2}, 0.5, 0.5)[1] == ()


def test_floors_that_leave_too_little_to_drop_are_refused() -> None:
    sizes = {f"group{number}": 1 for number in range(10)}
    with pytest.raises(ConfigError, match=r"^search\.floor: .*only 0 of 10 .* asks for 5"):
        cut(torch.rand(10), sizes, 0.5, 0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("place", "group"), [(0, "a"), (2, "a"), (3, "b"), (4, "b")])
def test_scores_that_are_not_finite_name_their_group(bad: float, place: int, group: str) -> None:
    scores = torch.rand(5)
    scores[place] = bad
    with pytest.raises(NonFiniteError, match=rf"^group {group}: .*not finite"):
        cut(scores, {"a": 3, "b": 2}, 0.5, 0.1)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_scores_given_are_left_alone(seed: int) -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(seed))
    before = scores.clone()
    cut(scores, {"a": 20}, 0.5, 0.1, lost=torch.arange(20) < 3)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(("size", "floor"), [(100, 0.07), (50, 0.14), (25, 0.28)])
def test_floor_and_ratio_that_leave_nothing_over_are_feasible(size: int, floor: float) -> None:
    """0.07 * 100 is 7.000000000000001 in floats, and its ceiling 8."""
    mask, _ = cut(torch.arange(size).float(), {"only": size}, 1 - floor, floor)
    assert mask.num_kept == round(size * floor)
