from __future__ import annotations

import pytest

from worm_dist import ConfigError
from worm_dist.planning.step_time import Link, ring_seconds


@pytest.mark.parametrize(
    ("text", "bits_per_second"),
    [
        ("10Gbit/s", 1e10),
        ("100 Mbit/s", 1e8),
        ("25Gbps", 2.5e10),
        ("1.25GB/s", 1e10),
        ("800kbit/s", 8e5),
        ("64bit/s", 64),
    ],
)
def test_bandwidths_are_read(text: str, bits_per_second: float) -> None:
    assert Link.parse(2, text).bits_per_second == bits_per_second


@pytest.mark.parametrize("text", ["10", "10G", "Gbit/s", "-1Gbit/s", "0Gbit/s", "10Gbit/h", ""])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--bandwidth"):
        Link.parse(2, text)


def test_a_link_joins_at_least_one_rank() -> None:
    with pytest.raises(ConfigError, match="--world"):
        Link.parse(0, "1Gbit/s")


@pytest.mark.parametrize(("world_size", "times"), [(1, 0), (2, 1), (4, 1.5), (8, 1.75)])
def test_a_ring_sends_almost_everything_twice(world_size: int, times: float) -> None:
    link = Link.parse(world_size, "1GB/s")
    assert ring_seconds(500_000_000, link) == times * 0.5
