"""Estimated time of a step, from compute time, world size and bandwidth."""

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
    """Network between the ranks.

    Attributes:
        world_size: number of ranks.
        bits_per_second: bandwidth of one rank's connection, in each direction.
        text: the bandwidth as the user wrote it.
    """

    world_size: int
    bits_per_second: float
    text: str

    @classmethod
    def parse(cls, world_size: int, bandwidth: str) -> Link:
        """Parse a bandwidth such as ``10Gbit/s``, ``100Mbps`` or ``1.25GB/s``.

        Raises:
            ConfigError: the bandwidth is invalid, or ``world_size`` is less than 1.
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
        bits = 8 if match[3] == "B" else 1
        return cls(world_size, number * _FACTORS[match[2]] * bits, bandwidth.strip())


def ring_seconds(payload_bytes: int, link: Link) -> float:
    """Time of a ring all-reduce in seconds: each rank sends and receives ``2 (n-1)/n`` x the bytes.

    Latency is not included.  Source: Patarin and Yuan, "Bandwidth optimal all-reduce algorithms"
    (2009).
    """
    share = 2 * (link.world_size - 1) / link.world_size
    return share * payload_bytes * 8 / link.bits_per_second


@dataclass(frozen=True)
class StepTime:
    """Time of a step without and with overlap of computation and communication.

    Attributes:
        compute_seconds: measured time of the forward and backward pass.
        all_reduce_seconds: time of the gradients' all-reduce by the formula.
    """

    compute_seconds: float
    all_reduce_seconds: float

    @property
    def shortest_seconds(self) -> float:
        """Step time with full overlap of all-reduce and computation."""
        return max(self.compute_seconds, self.all_reduce_seconds)

    @property
    def longest_seconds(self) -> float:
        """Step time without overlap."""
        return self.compute_seconds + self.all_reduce_seconds
