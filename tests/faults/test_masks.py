"""Masks that differ: a run ends before anything is packed by them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.courses import ALL_PHASES
from tests.faults.driver import Act, Driver, Fault, Run, busy
from worm_dist.groups.mask import Mask


def _one_more(real: Act, *args: Any) -> Any:
    candidates, mask, floored = real(*args)
    keep = mask.keep.clone()
    keep[int((~keep).nonzero()[0])] = True
    return candidates, Mask.from_vector(mask.sizes, keep), floored


def _another(real: Act, *args: Any) -> Any:
    candidates, mask, floored = real(*args)
    keep = mask.keep.clone()
    keep[int((~keep).nonzero()[0])], keep[int(keep.nonzero()[0])] = True, False
    return candidates, Mask.from_vector(mask.sizes, keep), floored


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(_another, marks=pytest.mark.fault(15, "one exit code of the command line")),
        pytest.param(_one_more, marks=pytest.mark.fault(16, "one exit code of the command line")),
    ],
)
def test_ranks_with_other_masks_end_alike(driver: Driver, cut: Act) -> None:
    """At the check that starts truncation; the first cut of all is at ``attach``.  gloo would abort
    a rank whose buffer is of another size, and add up other channels where the sizes are the same.
    """
    fault = Fault.do(cut, rank=1, step=3).at("worm_dist.search.ranking:Ranking.select")
    ends = driver(2, Run((fault,), {**ALL_PHASES, "truncation.frozen_weights": "hold"}))
    assert [(end.exitcode, len(end.errors)) for end in ends] == [(4, 1), (4, 0)]
    assert "(check at step 4): mask of group features.0: rank 1 differs" in ends[0].said
    assert max(end.seconds for end in ends) < busy(5)
