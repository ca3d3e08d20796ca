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
        # As far as the threshold is not above it.
        ((0.1, 0.0), True),
        ((0.0, 0.1), True),
        ((0.0, 0.11), False),
    ],
)
def test_is_settled_only_when_the_window_is_full_and_no_distance_is_above(
    distances: tuple[float, ...], settled: bool
) -> None:
    config = SearchConfig(window=3, settled=0.1)
    assert decide(config, [(), (0.5,), distances]).settled == settled
