"""Estimated time of a step, from compute time, world size, bandwidth and latency."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError

__all__ = [
    "FORMULAS",
    "Collective",
    "Kind",
    "Link",
    "StepTime",
    "in_backward",
    "in_forward",
    "in_passes",
    "parse_seconds",
    "ring_bytes",
    "seconds_of",
]

Kind = Literal["all-reduce", "reduce-scatter", "all-gather"]

FORMULAS: Mapping[Kind, str] = {
    "all-reduce": "2 (n-1)/n x bytes / bandwidth + 2 (n-1) x latency",
    "reduce-scatter": "(n-1)/n x bytes / bandwidth + (n-1) x latency",
    "all-gather": "(n-1) x a rank's bytes / bandwidth + (n-1) x latency",
}
"""Seconds of a collective by a ring of n ranks, in words; see ``seconds_of``.  gloo carries out a
reduce-scatter as an all-reduce."""

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
        is_gloo: whether the ranks are on CPUs and use gloo.
    """

    world_size: int
    bits_per_second: float
    text: str
    latency_seconds: float = 0.0
    is_gloo: bool = False

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
class Collective:
    """A collective of a step.  Times are shares of the forward and backward pass, 0 to 1; see
    ``in_backward``.

    Attributes:
        kind: what it does; only an all-gather sends weights.
        payload_bytes: bytes that a rank hands over, as ``Engine.traffic`` counts them: all ranks'
            elements in a reduction, its own in an all-gather.  With none there is no collective.
        ready: when it can start.
        needed: when computing waits for it; None if nothing but the end of the step does.
    """

    kind: Kind
    payload_bytes: int
    ready: float
    needed: float | None = None

    @property
    def sends_weights(self) -> bool:
        return self.kind == "all-gather"


def in_backward(share: float) -> float:
    """Turn a share of the backward pass into one of the forward and backward pass."""
    return 1 - _BACKWARD * (1 - share)


def in_forward(share: float) -> float:
    """Turn a share of the forward pass into one of the forward and backward pass."""
    return (1 - _BACKWARD) * share


def in_passes(collectives: Sequence[Collective], num_passes: int) -> list[Collective]:
    """Those of a step of several forward and backward passes, given those of each."""
    return [
        replace(
            each,
            ready=(number + each.ready) / num_passes,
            needed=None if each.needed is None else (number + each.needed) / num_passes,
        )
        for number in range(num_passes)
        for each in collectives
    ]


def ring_bytes(collective: Collective, link: Link) -> float:
    """Bytes that a rank sends in a collective by a ring.

    In an all-reduce that is ``2 (n-1)/n`` x what it hands over, in a reduce-scatter half of it.  In
    an all-gather it sends its own bytes and passes on those of all others but one.  gloo carries
    out a reduce-scatter as an all-reduce.

    Source: Patarin and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
    """
    num_messages, size = _num_messages(collective, link), link.world_size
    share = num_messages if collective.kind == "all-gather" else num_messages / size
    return share * collective.payload_bytes


def seconds_of(collective: Collective, link: Link) -> float:
    """Time of a collective by a ring in seconds; nothing takes no time."""
    if not collective.payload_bytes:
        return 0.0
    seconds = ring_bytes(collective, link) * 8 / link.bits_per_second
    return seconds + _num_messages(collective, link) * link.latency_seconds


def _num_messages(collective: Collective, link: Link) -> int:
    """Number of messages of a ring, one after another."""
    is_twice = collective.kind == "all-reduce" or (
        collective.kind == "reduce-scatter" and link.is_gloo
    )
    return (2 if is_twice else 1) * (link.world_size - 1)


@dataclass(frozen=True)
class StepTime:
    """Time of a step without, with complete and with the expected overlap of computation and
    communication.

    Attributes:
        compute_seconds: measured time of the forward and backward pass.
        communication_seconds: time of all collectives by the formula.
        expected_seconds: the time with collectives that run one after the other, each as soon as it
            can start, while computing waits for the weights that it needs.
    """

    compute_seconds: float
    communication_seconds: float
    expected_seconds: float

    @classmethod
    def of(cls, compute_seconds: float, collectives: Sequence[Collective], link: Link) -> StepTime:
        """Estimate a step.

        Args:
            compute_seconds: time of the forward and backward pass.
            collectives: the collectives in the order in which they start.
            link: the network between the ranks.
        """
        end = waited = communication_seconds = 0.0
        for collective in collectives:
            seconds = seconds_of(collective, link)
            end = max(collective.ready * compute_seconds + waited, end) + seconds
            if collective.needed is not None:
                waited += max(0.0, end - (collective.needed * compute_seconds + waited))
            communication_seconds += seconds
        expected_seconds = max(compute_seconds + waited, end)
        if link.is_gloo and any(collective.sends_weights for collective in collectives):
            # On CPUs there are no streams, so torch and DeepSpeed wait for each of them.
            expected_seconds = compute_seconds + communication_seconds
        return cls(compute_seconds, communication_seconds, expected_seconds)

    @property
    def shortest_seconds(self) -> float:
        """Step time with full overlap of communication and computation."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def longest_seconds(self) -> float:
        """Step time without overlap."""
        return self.compute_seconds + self.communication_seconds
