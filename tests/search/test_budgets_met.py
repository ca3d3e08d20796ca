"""Masks under a budget, for any cost that is a sum of products of widths: in plain Python."""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from itertools import product
from math import ceil
from math import floor as floor_of
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from worm_dist import ConfigError, Mask, NonFiniteError
from worm_dist.groups.cost_model import CostModel
from worm_dist.search.budgets import Budget
from worm_dist.search.rounding import rounded
from worm_dist.search.select import quantiles, select_channels


class _Case(NamedTuple):
    """Attributes:
    sizes: channels of each group.
    scores: with heavy ties.
    floor: what every group keeps.
    gone: irreversible channels.
    budget: of a random cost.
    """

    sizes: dict[str, int]
    scores: Tensor
    floor: float
    gone: Tensor
    budget: Budget

    @property
    def names(self) -> list[str]:
        return list(self.sizes)

    def cost(self, counts: list[int]) -> int:
        """Of so many channels of each group, in plain Python."""
        model, total = self.budget.cost, 0
        for term, coefficient in enumerate(model.coefficients.tolist()):
            for factor, fixed in enumerate(model.fixed[term].tolist()):
                each = model.per_channel[term, factor].tolist()
                coefficient *= fixed + sum(width * count for width, count in zip(each, counts))
            total += coefficient
        return total

    @property
    def limit(self) -> int:
        whole = self.cost(list(self.sizes.values()))
        return floor_of(Fraction(str(self.budget.share)) * whole)


@st.composite
def _cases(draw: st.DrawFn, most: int = 12) -> _Case:
    """Chains of layers, some of which read several groups, with norms and what no group shares."""
    channels = draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    num_groups, num_channels = len(channels), sum(channels)
    small = st.integers(0, 2)
    num_terms = draw(st.integers(1, 5))
    per_channel = torch.zeros(num_terms, 2, num_groups, dtype=torch.int64)
    fixed = torch.zeros(num_terms, 2, dtype=torch.int64)
    for term, factor in product(range(num_terms), range(2)):
        fixed[term, factor] = draw(small)
        for group in range(num_groups):
            per_channel[term, factor, group] = draw(small)
    coefficients = torch.tensor([draw(st.integers(0, 9)) for _ in range(num_terms)])
    sizes = {f"group{number}": size for number, size in enumerate(channels)}
    model = CostModel(0, coefficients, fixed, per_channel)
    dense = model.of(torch.tensor(channels))
    assume(dense)
    share = draw(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]))
    budget = Budget("flops", share, CostModel(dense, coefficients, fixed, per_channel), sizes)
    scores = torch.tensor([draw(st.integers(0, 4)) for _ in range(num_channels)]).float()
    gone = torch.tensor([draw(st.integers(0, 5)) == 0 for _ in range(num_channels)])
    return _Case(sizes, scores, draw(st.sampled_from([0.0, 0.1, 0.3])), gone, budget)


def _slowly(case: _Case, by_rank: bool) -> list[bool] | None:
    """Walk up the channels, irreversible ones first, and drop what the floor does not protect,
    until the budget is met; None if it cannot be."""
    channels = [
        (group, c) for group, name in enumerate(case.names) for c in range(case.sizes[name])
    ]
    alive = {channel: not gone for channel, gone in zip(channels, case.gone.tolist())}
    score = dict(zip(channels, case.scores.tolist()))
    place: dict[tuple[int, int], Fraction] = {}
    protected: set[tuple[int, int]] = set()
    for group, (_, size) in enumerate(case.sizes.items()):
        ascending = sorted(
            ((group, c) for c in range(size)), key=lambda each: (alive[each], score[each], each)
        )
        place |= {each: Fraction(2 * rank + 1, 2 * size) for rank, each in enumerate(ascending)}
        fewest = max(1, ceil(Fraction(str(case.floor)) * size))
        protected |= {each for each in ascending[-fewest:] if alive[each]}
    key = place if by_rank else score
    order = sorted(channels, key=lambda each: (alive[each], key[each], each))
    kept = set(channels)
    for each in [None, *order]:
        if each in protected:
            continue
        kept -= {each}
        counts = [sum(group == own for own, _ in kept) for group in range(len(case.names))]
        if case.cost(counts) <= case.limit and all(alive[channel] for channel in kept):
            return [channel in kept for channel in channels]
    return None


def _selected(case: _Case, by_rank: bool) -> Mask:
    scores, sizes, gone = case.scores, case.sizes, case.gone
    order = quantiles(scores, sizes, gone) if by_rank else scores
    return select_channels(order, sizes, [case.budget], case.floor, gone)[0]


@settings(max_examples=150)
@given(_cases(), st.booleans())
def test_the_fewest_channels_are_dropped_that_meet_it(case: _Case, by_rank: bool) -> None:
    expected = _slowly(case, by_rank)
    if expected is None:
        with pytest.raises(ConfigError, match=r"^search\.budget\.flops: .* cannot be met"):
            _selected(case, by_rank)
    else:
        assert _selected(case, by_rank).keep.tolist() == expected


@given(_cases(most=40), st.sampled_from([2, 3, 4]), st.data())
def test_blocks_meet_it_and_no_other_one_would(
    case: _Case, round_to: int, data: st.DataObject
) -> None:
    """Every width is one that may be, or the mask of the selection as it was."""
    try:
        mask = _selected(case, False)
    except ConfigError:
        assume(False)
    widths = {name: data.draw(st.sampled_from([1, 2]), label=name) for name in case.sizes}
    near = rounded(mask, case.scores, round_to, case.floor, case.gone, widths, case.budget)
    counts, own = near.num_kept_by_group.tolist(), mask.num_kept_by_group.tolist()
    assert case.cost(counts) <= case.limit
    assert not bool((near.keep & case.gone).any())
    allowed = _allowed(case, mask, round_to, widths)
    if not all(count in some for count, some in zip(counts, allowed)):
        assert near == mask
        assert case.cost([some[0] for some in allowed]) > case.limit  # even the least
        return
    for group, some in enumerate(allowed):
        above = some[bisect_right(some, counts[group]) :]
        if above:
            assert case.cost([*counts[:group], above[0], *counts[group + 1 :]]) > case.limit
    if own == counts:
        assert near == mask


def _allowed(case: _Case, mask: Mask, round_to: int, widths: dict[str, int]) -> list[list[int]]:
    """The channels that each group may keep."""
    allowed = []
    gone = dict(zip(case.names, case.gone.split(list(case.sizes.values()))))
    for name, size in case.sizes.items():
        width, own = widths[name], int(mask[name].sum())
        block = round_to if round_to % width == 0 else round_to * width
        fewest = max(1, ceil(Fraction(str(case.floor)) * size))
        counts = [
            count
            for count in range(fewest, size - int(gone[name].sum()) + 1)
            if count * width % round_to == 0 or count == size
        ]
        allowed.append(counts if counts and size * width > 4 * block else [own])
    return allowed


def test_of_two_blocks_that_fit_the_one_that_was_rounded_off_furthest_is_kept() -> None:
    """25 and 31 of 40 channels are kept; with 24 of each, one more block meets the budget."""
    one = torch.eye(2, dtype=torch.int64)[:, None]
    cost = CostModel(80, torch.ones(2, dtype=torch.int64), torch.zeros(2, 1).long(), one)
    keep = {"a": torch.arange(40) < 25, "b": torch.arange(40) < 31}
    mask, scores = Mask(keep), torch.arange(80, 0, -1).float()
    budget = Budget("channels", 0.7, cost, mask.sizes)
    near = rounded(mask, scores, 8, 0.1, budget=budget)
    assert near.num_kept_by_group.tolist() == [24, 32]
    assert torch.equal(near["b"], torch.arange(40) < 32)


def test_by_rank_all_groups_lose_about_the_same_share() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"wide": 64, "narrow": 16, "weak": 32}
    scores = torch.rand(112, generator=generator)
    scores[80:] /= 100  # all of its channels are the lowest, whatever happens within it
    each = torch.eye(3, dtype=torch.int64)[:, None]
    cost = CostModel(112, torch.ones(3, dtype=torch.int64), torch.zeros(3, 1).long(), each)
    none_gone = torch.zeros(112, dtype=torch.bool)
    budget = [Budget("channels", 0.5, cost, sizes)]
    uniform, _ = select_channels(quantiles(scores, sizes, none_gone), sizes, budget, 0.1)
    assert uniform.num_kept_by_group.tolist() == [32, 8, 16]
    free, _ = select_channels(scores, sizes, budget, 0.1)
    assert int(free["weak"].sum()) == 4  # its floor


def test_ranks_are_the_lower_the_lower_a_score_and_irreversible_channels_come_first() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0])
    gone = torch.tensor([True, False, False, False, False])
    ranks = quantiles(scores, {"a": 3, "b": 2}, gone)
    assert ranks.dtype == torch.float64
    assert ranks.tolist() == [0.5 / 3, 1.5 / 3, 2.5 / 3, 0.25, 0.75]


def test_scores_that_are_not_finite_have_no_rank() -> None:
    scores = torch.tensor([1.0, float("nan")])
    with pytest.raises(NonFiniteError, match=r"^group b: .*not finite"):
        quantiles(scores, {"a": 1, "b": 1}, torch.zeros(2, dtype=torch.bool))
