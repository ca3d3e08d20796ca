from __future__ import annotations

from typing import Literal

import pytest
import torch

from worm_dist import Mask
from worm_dist.config import ElbowConfig, SearchConfig
from worm_dist.search.convergence import History


def _mask(number: int) -> Mask:
    return Mask({"only": torch.arange(10) < number})


def _record(history: History, *numbers: int) -> None:
    for number in numbers:
        history.record(step=len(history.records) * 7, mask=_mask(number), floored=())


def test_a_finding_holds_what_the_check_saw() -> None:
    history = History(SearchConfig(window=3))
    history.record(4, _mask(2), ("group",))
    history.record(8, _mask(5), ())
    history.record(12, _mask(4), ())
    first, second, third = history.records
    assert (first.step, first.mask, first.floored) == (4, _mask(2), ("group",))
    assert (first.distances, first.distance_mean, first.distance_max) == ((), None, None)
    assert second.distances == (0.3,)
    assert third.distances == (0.2, 0.1)
    assert third.distance_mean == pytest.approx(0.15) and third.distance_max == 0.2
    assert third.threshold == pytest.approx(0.15)


def test_elbow_comes_before_settled() -> None:
    history = History(SearchConfig(window=4, settled=0.1))
    _record(history, 2, 8, 6, 6, 6, 6)
    assert [f.elbow for f in history.records] == [False, False, False, False, True, True]
    assert [f.settled for f in history.records] == [False] * 5 + [True]


@pytest.mark.parametrize("rule", ["relative", "kneedle"])
def test_a_settled_mask_is_past_its_elbow_whatever_the_rule_says(
    rule: Literal["relative", "kneedle"],
) -> None:
    """Masks that never moved have a flat curve, in which no rule finds an elbow."""
    history = History(SearchConfig(window=3, settled=0.1, elbow=ElbowConfig(rule=rule)))
    _record(history, 5, 5, 5)
    assert [f.elbow for f in history.records] == [False, False, True]
    assert history.records[-1].settled
