from __future__ import annotations

import dataclasses

import pytest

from worm_dist import ConfigError
from worm_dist.planning.step_time import (
    Collective,
    Kind,
    Link,
    StepTime,
    in_backward,
    parse_seconds,
    seconds_of,
)


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


@pytest.mark.parametrize(
    ("kind", "is_gloo", "shares"),
    [
        ("all-reduce", False, {1: 0, 2: 1, 4: 1.5, 8: 1.75}),
        ("reduce-scatter", False, {1: 0, 2: 0.5, 4: 0.75}),
        ("reduce-scatter", True, {2: 1, 4: 1.5}),  # which gloo does by an all-reduce
        ("all-gather", False, {1: 0, 2: 1, 4: 3}),
    ],
)
def test_a_ring_passes_on_what_is_not_its_own(
    kind: Kind, is_gloo: bool, shares: dict[int, float]
) -> None:
    for world_size, share in shares.items():
        link = dataclasses.replace(Link.parse(world_size, "1GB/s"), is_gloo=is_gloo)
        assert seconds_of(Collective(kind, 500_000_000, 1.0), link) == share * 0.5


@pytest.mark.parametrize(
    ("kind", "messages"), [("all-reduce", 14), ("reduce-scatter", 7), ("all-gather", 7)]
)
def test_every_message_of_a_ring_pays_the_latency(kind: Kind, messages: int) -> None:
    ideal, link = Link.parse(8, "1GB/s"), Link.parse(8, "1GB/s", "0.5ms")
    paid = seconds_of(Collective(kind, 8, 1.0), link) - seconds_of(Collective(kind, 8, 1.0), ideal)
    assert paid == pytest.approx(messages * 0.0005)
    assert seconds_of(Collective(kind, 0, 1.0), link) == 0.0  # none is started for nothing


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


def _bucket(payload_bytes: int, share_of_backward: float) -> Collective:
    return Collective("all-reduce", payload_bytes, in_backward(share_of_backward))


def test_a_single_bucket_waits_for_the_whole_backward_pass() -> None:
    step = StepTime.of(3.0, [_bucket(2_000_000_000, 1.0)], LINK)
    assert (step.expected_seconds, step.longest_seconds, step.shortest_seconds) == (5.0, 5.0, 3.0)


def test_buckets_are_reduced_one_after_the_other_when_they_are_ready() -> None:
    """The forward pass takes one of three seconds, half of the backward pass another."""
    buckets = [_bucket(500_000_000, 0.5), _bucket(250_000_000, 1.0)]
    assert StepTime.of(3.0, buckets, LINK).expected_seconds == 3.25
    buckets = [_bucket(2_000_000_000, 0.5), _bucket(250_000_000, 1.0)]
    step = StepTime.of(3.0, buckets, LINK)
    assert (step.expected_seconds, step.communication_seconds) == (4.25, 2.25)


def test_computing_waits_for_weights_and_what_comes_later_with_it() -> None:
    """The second layer's weights take three seconds instead of the one that the first computes, so
    its gradients come two seconds later; their reduce-scatter has nothing to hide behind."""
    gathers = [
        Collective("all-gather", 1_000_000_000, 0.0, 0.0),
        Collective("all-gather", 3_000_000_000, 0.0, 1 / 3),
    ]
    assert StepTime.of(3.0, gathers, LINK).expected_seconds == pytest.approx(1 + 3 + 2)
    steps = [*gathers, Collective("reduce-scatter", 1_000_000_000, 1.0)]
    step = StepTime.of(3.0, steps, LINK)
    assert step.expected_seconds == pytest.approx(1 + 3 + 2 + 0.5)
    # On CPUs nothing hides behind anything.
    on_cpus = StepTime.of(3.0, steps, dataclasses.replace(LINK, is_gloo=True))
    assert on_cpus.expected_seconds == pytest.approx(3 + 1 + 3 + 1)


def test_without_anything_to_send_a_step_only_computes() -> None:
    assert StepTime.of(3.0, [_bucket(0, 1.0)], LINK).expected_seconds == 3.0
    assert StepTime.of(3.0, [], LINK).expected_seconds == 3.0
