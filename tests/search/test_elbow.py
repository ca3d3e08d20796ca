from __future__ import annotations

from typing import Any

import pytest

from worm_dist.config import ElbowConfig, SearchConfig
from worm_dist.search.elbow import elbow_reached, elbow_threshold

FALLING = [0.5 * 0.6**number for number in range(12)]  # 0.5, 0.3, 0.18, 0.108, 0.065, ...


def _first_check(means: list[float], **elbow: Any) -> int | None:
    """Number of masks when the rule fires first."""
    config = SearchConfig(settled=0.1, elbow=ElbowConfig(**elbow))
    return next(
        (n + 1 for n in range(1, len(means) + 1) if elbow_reached(config, means[:n])),
        None,
    )


def test_margin_fires_below_settled_plus_margin() -> None:
    config = SearchConfig(settled=0.1, elbow=ElbowConfig(rule="margin", margin=0.05))
    assert elbow_threshold(config, FALLING) == pytest.approx(0.15)
    assert _first_check(FALLING, rule="margin", margin=0.05) == 5  # at 0.108
    assert _first_check([0.151] * 3, rule="margin", margin=0.05) is None


def test_margin_looks_at_the_newest_distance_only() -> None:
    assert _first_check([0.01, 0.5, 0.5], rule="margin", min_masks=3) is None


def test_relative_fires_below_a_fraction_of_the_largest() -> None:
    config = SearchConfig(elbow=ElbowConfig(rule="relative", fraction=0.5))
    assert elbow_threshold(config, [0.2, 0.6, 0.4]) == pytest.approx(0.3)
    assert elbow_threshold(config, []) is None
    # Rises first, as when a learning rate warms up.
    assert _first_check([0.2, 0.6, 0.4, 0.31, 0.29], rule="relative", fraction=0.5) == 6


def test_relative_finds_the_elbow_of_a_curve_that_never_gets_small() -> None:
    high = [0.3 + mean for mean in FALLING]
    assert _first_check(high, rule="margin") is None
    assert _first_check(high, rule="relative", fraction=0.5) == 6  # 0.365 < 0.4


def test_kneedle_fires_once_the_curve_has_bent() -> None:
    bent = [0.5, 0.4, 0.3, 0.2, 0.1, 0.09, 0.08, 0.07]
    fired = _first_check(bent, rule="kneedle")
    assert fired is not None and fired >= 6  # the bend is at the fifth mean, the sixth mask


@pytest.mark.parametrize(
    "means",
    [
        [0.8 - 0.05 * number for number in range(12)],  # a straight line
        [0.3] * 12,  # flat
        [0.5, 0.1],  # too short to say
    ],
)
def test_kneedle_does_not_fire_without_a_bend(means: list[float]) -> None:
    assert _first_check(means, rule="kneedle") is None


@pytest.mark.parametrize("rule", ["margin", "relative", "kneedle"])
def test_no_rule_fires_before_min_masks(rule: str) -> None:
    fallen = [0.5, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]
    fired = _first_check(fallen, rule=rule, min_masks=7)
    assert fired == 7
    early = _first_check(fallen, rule=rule, min_masks=2)
    assert early is not None and early < 7
