"""Estimate: how long a step would take on so many ranks, joined by such a network."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["FORMULA", "Link", "StepTime", "ring_seconds"]

FORMULA = "2 (n-1)/n x bytes / bandwidth"

_FACTORS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(bit|b|B)(?:/s|ps)")


@dataclass(frozen=True)
class Link:
    """What joins the ranks.

    Attributes:
        world_size: ranks.
        bits_per_second: of one rank's connection, in each direction.
        text: the bandwidth as it was given.
    """

    world_size: int
    bits_per_second: float
    text: str

    @classmethod
    def parse(cls, world_size: int, bandwidth: str) -> Link:
        """From a bandwidth such as ``10Gbit/s``, ``100Mbps`` or ``1.25GB/s``.

        Raises:
            ConfigError: it is none, or there is no rank.
        """
        if world_size < 1:
            raise ConfigError(f"--world: {world_size} ranks; give at least 1")
        found = _BANDWIDTH.fullmatch(bandwidth.strip())
        number = float(found[1]) if found else 0.0
        if not found or number == 0:
            raise ConfigError(
                f"--bandwidth: {bandwidth!r} is none; write 10Gbit/s, 100Mbit/s or 1.25GB/s"
            )
        bits = 8 if found[3] == "B" else 1
        return cls(world_size, number * _FACTORS[found[2]] * bits, bandwidth.strip())


def ring_seconds(payload_bytes: int, link: Link) -> float:
    """A ring all-reduce: every rank sends and receives each byte ``2 (n-1)/n`` times.

    Source: Patarin and Yuan, "Bandwidth optimal all-reduce algorithms" (2009); latency left out.
    """
    share = 2 * (link.world_size - 1) / link.world_size
    return share * payload_bytes * 8 / link.bits_per_second


@dataclass(frozen=True)
class StepTime:
    """Attributes:
    compute_seconds: forward and backward pass, measured.
    all_reduce_seconds: of the gradients, by the formula.
    """

    compute_seconds: float
    all_reduce_seconds: float

    @property
    def shortest_seconds(self) -> float:
        """The all-reduce runs wholly beside the computation."""
        return max(self.compute_seconds, self.all_reduce_seconds)

    @property
    def longest_seconds(self) -> float:
        """One after the other."""
        return self.compute_seconds + self.all_reduce_seconds
