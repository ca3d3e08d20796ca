from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worm_dist import ConfigError, WormConfig
from worm_dist.ratio import exact, parse_ratio
from worm_dist.search.budgets import Pool


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_a_fraction_is_read_exactly(parts: tuple[int, int]) -> None:
    """Also with the sixteen digits that a settings file would have of it."""
    numerator, denominator = parts
    ratio = parse_ratio(f"{numerator}/{denominator}")
    assert isinstance(ratio, float)
    assert exact(ratio) == exact(float(repr(ratio))) == Fraction(numerator, denominator)


@given(st.integers(0, 10**5), st.integers(1, 5))
def test_a_short_decimal_is_what_it_says(number: int, digits: int) -> None:
    assert exact(number / 10**digits) == Fraction(number, 10**digits)


@pytest.mark.parametrize(
    ("ratio", "num_channels", "dropped"),
    [(1 / 3, 12, 4), (0.333333, 12, 4), (0.666667, 12, 8), (0.29, 100, 29), (0.7, 90, 63)],
)
def test_counts_lose_nothing_to_rounding(ratio: float, num_channels: int, dropped: int) -> None:
    assert Pool(ratio, ("only",)).num_dropped(num_channels) == dropped


def test_settings_take_fractions() -> None:
    search = WormConfig(search={"prune_ratio": "1/3", "ratios": {"a": "2/3"}}).search
    assert (search.prune_ratio, search.ratios) == (1 / 3, {"a": 2 / 3})
    # Together exactly 1, which floats might exceed.
    WormConfig(search={"prune_ratio": "2/3", "min_keep_ratio": "1/3"})


@pytest.mark.parametrize("text", ["1/0", "3/2", "1/3/4", "-1/3", "a third"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^search\.prune_ratio: "):
        WormConfig(search={"prune_ratio": text})
