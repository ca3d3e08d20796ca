"""Estimated time of a step, from compute time, world size, bandwidth and latency."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["FORMULA", "Bucket", "Link", "StepTime", "parse_seconds", "ring_seconds"]

FORMULA = "2 (n-1)/n x bytes / bandwidth + 2 (n-1) x latency"

_FACTORS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|s)")
_BACKWARD = 2 / 3
"""Share of the backward pass in the compute time: it has two products where the forward pass has
one."""
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(bit|b|B)(?:/s|ps)")


@dataclass(frozen=True)
class Link:
    """Network between the ranks.

    Attributes:
        world_size: number of ranks.
        bits_per_second: bandwidth of one rank's connection, in each direction.
        text: the bandwidth as the user wrote it.
        latency_seconds: time until the first byte of a message has arrived.
    """

    world_size: int
    bits_per_second: float
    text: str
    latency_seconds: float = 0.0

    @classmethod
    def parse(cls, world_size: int, bandwidth: str, latency: str = "0us") -> Link:
        """Parse a bandwidth such as ``10Gbit/s``, ``100Mbps`` or ``1.25GB/s``, and a latency such
        as ``50us``.

        Raises:
            ConfigError: the bandwidth or the latency is invalid, or ``world_size`` is less than 1.
        """
        if world_size < 1:
            raise ConfigError(f"--world: {world_size} ranks; give at least 1")
        match = _BANDWIDTH.fullmatch(bandwidth.strip())
        number = float(match[1]) if match else 0.0
        if not match or number == 0:
            raise ConfigError(
                f"--bandwidth: {bandwidth!r} is not a bandwidth; write 10Gbit/s, 100Mbit/s or "
                "1.25GB/s"
            )
        seconds = parse_seconds("--latency", latency)
        bits = 8 if match[3] == "B" else 1
        return cls(world_size, number * _FACTORS[match[2]] * bits, bandwidth.strip(), seconds)


def parse_seconds(option: str, text: str) -> float:
    """Parse a time such as ``50us``, ``0.1ms`` or ``2s``.

    Args:
        option: the option, for the error message.
        text: what the user wrote.

    Raises:
        ConfigError: it is not a time.
    """
    match = _SECONDS.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"{option}: {text!r} is not a time; write 50us, 0.1ms or 2s")
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together.

    Attributes:
        payload_bytes: bytes that a rank passes to the all-reduce; with none there is no all-reduce.
        ready: share of the backward pass after which these gradients are there, 0 to 1.
    """

    payload_bytes: int
    ready: float


def ring_seconds(payload_bytes: int, link: Link) -> float:
    """Time of a ring all-reduce in seconds: in ``2 (n-1)`` messages after one another, each rank
    sends and receives ``2 (n-1)/n`` x the bytes.  Nothing takes no time.

    Source: Patarin and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
    """
    if not payload_bytes:
        return 0.0
    num_messages = 2 * (link.world_size - 1)
    share = num_messages / link.world_size
    return share * payload_bytes * 8 / link.bits_per_second + num_messages * link.latency_seconds


@dataclass(frozen=True)
class StepTime:
    """Time of a step without, with complete and with the expected overlap of computation and
    communication.

    Attributes:
        compute_seconds: measured time of the forward and backward pass.
        all_reduce_seconds: time of the gradients' all-reduce by the formula.
        expected_seconds: the time with buckets that are reduced one after the other, each as soon
            as its gradients are there.
    """

    compute_seconds: float
    all_reduce_seconds: float
    expected_seconds: float

    @classmethod
    def of(cls, compute_seconds: float, buckets: Sequence[Bucket], link: Link) -> StepTime:
        """Estimate a step.

        Args:
            compute_seconds: time of the forward and backward pass.
            buckets: the buckets of the gradients, in the order in which they are reduced.
            link: the network between the ranks.
        """
        end = all_reduce_seconds = 0.0
        for bucket in buckets:
            seconds = ring_seconds(bucket.payload_bytes, link)
            ready = compute_seconds * (1 - _BACKWARD * (1 - bucket.ready))
            end = max(ready, end) + seconds
            all_reduce_seconds += seconds
        return cls(compute_seconds, all_reduce_seconds, max(compute_seconds, end))

    @property
    def shortest_seconds(self) -> float:
        """Step time with full overlap of all-reduce and computation."""
        return max(self.compute_seconds, self.all_reduce_seconds)

    @property
    def longest_seconds(self) -> float:
        """Step time without overlap."""
        return self.compute_seconds + self.all_reduce_seconds
