from __future__ import annotations

from fractions import Fraction
from math import ceil
from math import floor as floor_of
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from worm_dist import ConfigError, NonFiniteError
from worm_dist.search.budgets import Pool
from worm_dist.search.select import select_channels

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(
    lambda sizes: {f"group{number}": size for number, size in enumerate(sizes)}
)
RATIOS = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9])

_Case = tuple[dict[str, int], Tensor, float, float]
_PooledCase = tuple[dict[str, int], Tensor, list[Pool], float]


@st.composite
def _cases(draw: st.DrawFn) -> _Case:
    """Sizes, scores with heavy ties, a ratio and a floor."""
    sizes = draw(SIZES)
    num_channels = sum(sizes.values())
    levels = draw(st.lists(st.integers(0, 3), min_size=num_channels, max_size=num_channels))
    return sizes, torch.tensor(levels).float(), draw(RATIOS), draw(st.sampled_from([0, 0.1, 0.3]))


@st.composite
def _pooled(draw: st.DrawFn) -> _PooledCase:
    """The same, the groups dealt out to pools of their own ratios."""
    sizes, scores, _, floor = draw(_cases())
    dealt: dict[int, list[str]] = {}
    for name in draw(st.permutations(list(sizes))):
        dealt.setdefault(draw(st.integers(0, 2)), []).append(name)
    return sizes, scores, [Pool(draw(RATIOS), tuple(names)) for names in dealt.values()], floor


def _flags(draw: st.DrawFn, num_channels: int) -> list[bool]:
    return draw(st.lists(st.booleans(), min_size=num_channels, max_size=num_channels))


def _slowly(
    sizes: dict[str, int],
    scores: list[float],
    pools: list[Pool],
    floor: float,
    irreversible: list[bool],
) -> tuple[list[bool], tuple[str, ...]]:
    """The cut in plain Python: pool by pool walk up the sorted channels, the irreversible ones
    first, and skip what the floor protects."""
    names = list(sizes)
    channels = [(group, c) for group, size in enumerate(sizes.values()) for c in range(size)]
    ranked = sorted((not gone, score, c) for gone, score, c in zip(irreversible, scores, channels))
    dropped: set[tuple[int, int]] = set()
    spared: set[tuple[int, int]] = set()
    for pool in pools:
        here = [(alive, c) for alive, _, c in ranked if names[c[0]] in pool.groups]
        protected = set()
        for name in pool.groups:
            of_group = [(alive, c) for alive, c in here if names[c[0]] == name]
            best = of_group[-_num_protected(floor, sizes[name]) :]
            protected |= {c for alive, c in best if alive}
        num_dropped = max(_num_dropped(pool.ratio, len(here)), sum(not alive for alive, _ in here))
        free = [c for _, c in here if c not in protected]
        if len(free) < num_dropped:
            raise ConfigError("too few")
        dropped |= set(free[:num_dropped])
        spared |= {c for _, c in here[:num_dropped] if c in protected}
    floored = tuple(names[group] for group in sorted({group for group, _ in spared}))
    return [channel not in dropped for channel in channels], floored


def _num_dropped(ratio: float, num_channels: int) -> int:
    """Rounded down as in decimals, not as in binary fractions."""
    return floor_of(Fraction(str(ratio)) * num_channels)


def _num_protected(floor: float, size: int) -> int:
    return max(1, ceil(Fraction(str(floor)) * size))


def _feasible(sizes: dict[str, int], ratio: float, floor: float) -> bool:
    protected = sum(_num_protected(floor, size) for size in sizes.values())
    return _num_dropped(ratio, sum(sizes.values())) <= sum(sizes.values()) - protected


@settings(max_examples=50)
@given(_cases())
def test_order_is_total_by_score_then_group_then_channel(case: _Case) -> None:
    """A number in the place of pools is the ratio of one pool of all groups."""
    sizes, scores, ratio, floor = case
    assume(_feasible(sizes, ratio, floor))
    mask, floored = select_channels(scores, sizes, ratio, floor)
    everything = [Pool(ratio, tuple(sizes))]
    expected = _slowly(sizes, scores.tolist(), everything, floor, [False] * scores.numel())
    assert (mask.keep.tolist(), floored) == expected


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
    mask, floored = select_channels(scores, sizes, ratio, 0)
    assert torch.equal(mask.keep, published)
    assert floored == ()


@settings(max_examples=50)
@given(_cases(), st.data())
def test_lost_channels_are_dropped_whatever_their_score(case: _Case, data: st.DataObject) -> None:
    sizes, scores, ratio, floor = case
    flags = data.draw(
        st.lists(st.booleans(), min_size=scores.numel(), max_size=scores.numel()),
        label="irreversible",
    )
    irreversible = torch.tensor(flags)
    try:
        mask, _ = select_channels(scores, sizes, ratio, floor, irreversible)
    except ConfigError:
        assume(False)
    assert not bool((mask.keep & irreversible).any())
    num_dropped = scores.numel() - mask.num_kept
    assert num_dropped == max(_num_dropped(ratio, scores.numel()), int(irreversible.sum()))


@given(_pooled(), st.data())
def test_pools_are_cut_apart_as_in_plain_python(case: _PooledCase, data: st.DataObject) -> None:
    """Ratios, floors, ties and irreversible channels at once; what cannot be done is refused."""
    sizes, scores, pools, floor = case
    irreversible = data.draw(st.composite(_flags)(scores.numel()), label="irreversible")
    try:
        expected = _slowly(sizes, scores.tolist(), pools, floor, irreversible)
    except ConfigError:
        with pytest.raises(ConfigError, match=r"^search\.min_keep_ratio: "):
            select_channels(scores, sizes, pools, floor, torch.tensor(irreversible))
        return
    mask, floored = select_channels(scores, sizes, pools, floor, torch.tensor(irreversible))
    assert (mask.keep.tolist(), floored) == expected


@given(_pooled())
def test_each_pool_loses_its_own_count_exactly_and_each_group_keeps_its_floor(
    case: _PooledCase,
) -> None:
    sizes, scores, pools, floor = case
    for pool in pools:
        assume(_feasible({name: sizes[name] for name in pool.groups}, pool.ratio, floor))
    mask, _ = select_channels(scores, sizes, pools, floor)
    for pool in pools:
        channels = sum(sizes[name] for name in pool.groups)
        kept = sum(int(mask[name].sum()) for name in pool.groups)
        assert channels - kept == _num_dropped(pool.ratio, channels)
    for name, size in sizes.items():
        assert int(mask[name].sum()) >= _num_protected(floor, size)


@settings(max_examples=50)
@given(_pooled(), st.randoms(use_true_random=False))
def test_the_order_of_pools_and_of_groups_in_them_means_nothing(
    case: _PooledCase, random: Random
) -> None:
    sizes, scores, pools, floor = case
    shuffled = [Pool(p.ratio, tuple(random.sample(p.groups, len(p.groups)))) for p in pools]
    random.shuffle(shuffled)
    try:
        expected = select_channels(scores, sizes, pools, floor)
    except ConfigError:
        with pytest.raises(ConfigError):
            select_channels(scores, sizes, shuffled, floor)
        return
    assert select_channels(scores, sizes, shuffled, floor) == expected


@settings(max_examples=50)
@given(SIZES, st.randoms(use_true_random=False), RATIOS)
def test_where_scores_differ_the_order_of_groups_and_channels_means_nothing(
    sizes: dict[str, int], random: Random, ratio: float
) -> None:
    assume(_feasible(sizes, ratio, 0.1))
    names = random.sample(list(sizes), len(sizes))
    numbers = iter(random.sample(range(sum(sizes.values())), sum(sizes.values())))
    scores = {name: [float(next(numbers)) for _ in range(size)] for name, size in sizes.items()}
    order = {name: random.sample(range(size), size) for name, size in sizes.items()}
    mask, _ = select_channels(
        torch.tensor([s for n in sizes for s in scores[n]]), sizes, ratio, 0.1
    )
    shuffled, _ = select_channels(
        torch.tensor([scores[name][channel] for name in names for channel in order[name]]),
        {name: sizes[name] for name in names},
        ratio,
        0.1,
    )
    for name in sizes:
        assert torch.equal(shuffled[name], mask[name][order[name]])


@settings(max_examples=30)
@given(_cases())
def test_scores_of_any_scale_give_the_same_mask(case: _Case) -> None:
    sizes, scores, ratio, floor = case
    assume(_feasible(sizes, ratio, floor))
    assert select_channels(scores, sizes, ratio, floor) == select_channels(
        scores * 2.0**-20, sizes, ratio, floor
    )


@pytest.mark.fault(25, "a group that would be emptied")
def test_floor_spares_the_best_of_a_weak_group_and_takes_from_the_others() -> None:
    sizes = {"weak": 4, "strong": 4}
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0])
    mask, floored = select_channels(scores, sizes, 0.5, 0.25)
    assert mask.keep.tolist() == [False, False, False, True, False, True, True, True]
    assert floored == ("weak",)


def test_a_floor_that_does_not_bind_is_not_named() -> None:
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8])
    assert select_channels(scores, {"a": 2, "b": 2}, 0.5, 0.5)[1] == ()


def test_floors_that_leave_too_little_to_drop_are_refused() -> None:
    sizes = {f"group{number}": 1 for number in range(10)}
    with pytest.raises(ConfigError, match=r"^search\.min_keep_ratio: .*only 0 of 10 .* asks for 5"):
        select_channels(torch.rand(10), sizes, 0.5, 0.1)


def test_the_pool_that_cannot_lose_its_share_is_named() -> None:
    """The other pool has channels enough, but they are not this one's to give."""
    pools = [Pool(0.1, ("large",)), Pool(0.75, ("small", "tiny"))]
    message = (
        "search.min_keep_ratio: 0.5 protects so many channels of groups small and 1 more that only "
        "3 of 6 may be dropped, but the ratio 0.75 asks for 4; lower one of them"
    )
    with pytest.raises(ConfigError) as error:
        select_channels(torch.rand(46), {"large": 40, "small": 4, "tiny": 2}, pools, 0.5)
    assert str(error.value) == message


def test_what_the_floor_spares_is_taken_from_the_same_pool() -> None:
    """Group c has the lowest channel that is left, but is cut by itself."""
    sizes = {"a": 2, "b": 2, "c": 2}
    scores = torch.tensor([1.0, 2.0, 8.0, 9.0, 3.0, 4.0])
    mask, floored = select_channels(scores, sizes, [Pool(0.5, ("a", "b")), Pool(0, ("c",))], 0.5)
    assert mask.keep.tolist() == [False, True, False, True, True, True]
    assert floored == ("a",)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("place", "group"), [(0, "a"), (2, "a"), (3, "b"), (4, "b")])
def test_scores_that_are_not_finite_name_their_group(bad: float, place: int, group: str) -> None:
    scores = torch.rand(5)
    scores[place] = bad
    with pytest.raises(NonFiniteError, match=rf"^group {group}: .*not finite"):
        select_channels(scores, {"a": 3, "b": 2}, 0.5, 0.1)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_scores_given_are_left_alone(seed: int) -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(seed))
    before = scores.clone()
    select_channels(scores, {"a": 20}, 0.5, 0.1, irreversible=torch.arange(20) < 3)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(("size", "floor"), [(100, 0.07), (50, 0.14), (25, 0.28)])
def test_floor_and_ratio_that_leave_nothing_over_are_feasible(size: int, floor: float) -> None:
    """0.07 * 100 is 7.000000000000001 in floats, and its ceiling 8."""
    mask, _ = select_channels(torch.arange(size).float(), {"only": size}, 1 - floor, floor)
    assert mask.num_kept == round(size * floor)
