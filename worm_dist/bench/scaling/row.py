"""Row of the benchmark: one kind of step, or a check, on a number of ranks over a link."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..json_lines import read

__all__ = ["CHECK", "ScaleRow", "read_scale_rows"]

CHECK = "check"
"""Name of the row of a check."""


@dataclass(frozen=True)
class ScaleRow:
    """Figures of a step or a check, for one rank; bytes and packets are means over the ranks.

    Attributes:
        model: name of the network.
        variant: the kind of step; or ``CHECK``.
        ranks: number of ranks.
        network: rate of each rank's link.
        collectives: collectives of a rank.
        payload_bytes: bytes that a rank passes to collectives.
        ring_bytes: bytes that a rank sends for this payload by the formula of a ring.
        wire_bytes: bytes that left its interface, with headers and acknowledgements; 0 over the
            loopback, whose counter has all traffic of the machine.
        packets: packets that left its interface; likewise.
        seconds: median time of the slowest rank.
        compute_seconds: median time of the same without averaging the gradients, on all ranks at
            the same time; 0 for a check.
        latency_seconds: measured latency of a message.
        bits_per_second: bandwidth that an all-reduce of the dense network's gradients reached
            while nothing was computed.
        estimate_seconds: what ``plan`` estimates, from this compute time, latency and bandwidth;
            None for a check.
        nominal_estimate_seconds: the same from the link's rate; None also if that is not limited.
    """

    model: str
    variant: str
    ranks: int
    network: str
    collectives: int
    payload_bytes: int
    ring_bytes: float
    wire_bytes: float
    packets: float
    seconds: float
    compute_seconds: float
    latency_seconds: float
    bits_per_second: float
    estimate_seconds: float | None
    nominal_estimate_seconds: float | None


def read_scale_rows(path: Path) -> list[ScaleRow]:
    """Read the rows of a file, if it exists; the newest of each kind.

    Raises:
        CheckpointError: another version has written the file.
    """
    rows = read(path, ScaleRow)
    return list({(r.model, r.variant, r.ranks, r.network): r for r in rows}.values())
