from __future__ import annotations

import pytest

from worm_dist import ConfigError
from worm_dist.search.budgets import Pool, pools_of

SIZES = {"conv1": 16, "layer1.0.conv1": 8, "layer1.1.conv1": 8, "layer2.0.conv1": 32, "fc1": 64}


def test_one_threshold_is_one_pool() -> None:
    assert pools_of(SIZES, 0.5, "global", {}) == (Pool(0.5, tuple(SIZES)),)


def test_a_threshold_for_each_layer_is_a_pool_for_each_group() -> None:
    assert pools_of(SIZES, 0.3, "layer", {}) == tuple(Pool(0.3, (name,)) for name in SIZES)


def test_groups_with_a_ratio_of_their_own_leave_the_global_pool_each_for_itself() -> None:
    assert pools_of(SIZES, 0.5, "global", {"layer1.*": 0.25, "conv1": 0}) == (
        Pool(0, ("conv1",)),
        Pool(0.25, ("layer1.0.conv1",)),
        Pool(0.25, ("layer1.1.conv1",)),
        Pool(0.5, ("layer2.0.conv1", "fc1")),
    )


def test_groups_with_a_ratio_of_their_own_among_layers() -> None:
    ratios = {pool.groups: pool.ratio for pool in pools_of(SIZES, 0.5, "layer", {"fc?": 0.9})}
    assert ratios == {(name,): 0.9 if name == "fc1" else 0.5 for name in SIZES}


def test_ratios_for_all_leave_no_global_pool() -> None:
    assert pools_of(SIZES, 0.5, "global", {"*": 0.25}) == pools_of(SIZES, 0.25, "layer", {})


def test_the_first_pattern_that_matches_counts() -> None:
    pools = pools_of(SIZES, 0.5, "global", {"layer1.0.conv1": 0, "layer1.*": 0.25, "*": 0.75})
    assert {pool.groups[0]: pool.ratio for pool in pools} == {
        "conv1": 0.75,
        "layer1.0.conv1": 0,
        "layer1.1.conv1": 0.25,
        "layer2.0.conv1": 0.75,
        "fc1": 0.75,
    }


def test_a_pattern_that_comes_too_late_is_refused() -> None:
    """It would be set and do nothing."""
    with pytest.raises(ConfigError, match=r"'layer1.0.\*' matches only what .* before them"):
        pools_of(SIZES, 0.5, "global", {"layer1.*": 0.25, "layer1.0.*": 0})


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer1.0.con1", "did you mean layer1.0.conv1?"),
        ("Conv1", "did you mean conv1?"),
        ("zzz", "there are conv1, layer1.0.conv1, layer1.1.conv1 and so on"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_the_nearest_name(pattern: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        pools_of(SIZES, 0.5, "global", {pattern: 0.25})
    assert str(error.value).startswith(f"search.ratios: {pattern!r} matches no group")
    assert hint in str(error.value)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"of group conv1 cannot be dropped"):
        pools_of(SIZES, 0.5, "global", {"conv1": ratio})


@pytest.mark.parametrize(("ratio", "count"), [(0.7, 7), (0.29, 2), (0, 0), (0.1, 1)])
def test_the_count_is_rounded_down_as_in_decimals(ratio: float, count: int) -> None:
    assert Pool(ratio, ("a",)).num_dropped(10) == count
    assert Pool(0.29, ("a",)).num_dropped(100) == 29  # 28.999999999999996 in floats
