from __future__ import annotations

import pytest

from worm_dist.config import SearchConfig
from worm_dist.search.decision import decide


@pytest.mark.parametrize(
    ("distances", "settled"),
    [
        ((), False),
        ((0.0,), False),
        ((0.0, 0.0), True),
        ((0.09, 0.0), True),
        # As far as the threshold is not below it.
        ((0.1, 0.0), False),
        ((0.0, 0.1), False),
    ],
)
def test_is_settled_only_when_the_window_is_full_and_every_distance_is_below(
    distances: tuple[float, ...], settled: bool
) -> None:
    config = SearchConfig(window=3, settled=0.1)
    assert decide(config, [(), (0.5,), distances]).settled == settled
