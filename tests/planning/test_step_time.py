from __future__ import annotations

import pytest

from worm_dist import ConfigError
from worm_dist.planning.step_time import Bucket, Link, StepTime, parse_seconds, ring_seconds


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


@pytest.mark.parametrize(("world_size", "messages"), [(1, 0), (2, 2), (8, 14)])
def test_every_message_of_a_ring_pays_the_latency(world_size: int, messages: int) -> None:
    link = Link.parse(world_size, "1GB/s", "0.5ms")
    ring = 2 * (world_size - 1) / world_size
    assert ring_seconds(8_000_000, link) == pytest.approx(ring * 0.008 + messages * 0.0005)
    assert ring_seconds(0, link) == 0.0  # no all-reduce is started for an empty bucket


@pytest.mark.parametrize("text", ["50", "us", "-1us", "1h", ""])
def test_what_is_no_latency_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--latency"):
        Link.parse(2, "1Gbit/s", text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("100ms", 0.1), ("2 s", 2.0), ("0.5us", 5e-7), ("7ns", 7e-9)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds("--compute", text) == pytest.approx(seconds)


LINK = Link.parse(2, "1GB/s")


def test_a_single_bucket_waits_for_the_whole_backward_pass() -> None:
    step = StepTime.of(3.0, [Bucket(2_000_000_000, 1.0)], LINK)
    assert (step.expected_seconds, step.longest_seconds, step.shortest_seconds) == (5.0, 5.0, 3.0)


def test_buckets_are_reduced_one_after_the_other_when_they_are_ready() -> None:
    """The forward pass takes one of three seconds, half of the backward pass another."""
    buckets = [Bucket(500_000_000, 0.5), Bucket(250_000_000, 1.0)]
    assert StepTime.of(3.0, buckets, LINK).expected_seconds == 3.25
    buckets = [Bucket(2_000_000_000, 0.5), Bucket(250_000_000, 1.0)]
    step = StepTime.of(3.0, buckets, LINK)
    assert (step.expected_seconds, step.all_reduce_seconds) == (4.25, 2.25)


def test_without_anything_to_send_a_step_only_computes() -> None:
    assert StepTime.of(3.0, [Bucket(0, 1.0)], LINK).expected_seconds == 3.0
    assert StepTime.of(3.0, [], LINK).expected_seconds == 3.0
