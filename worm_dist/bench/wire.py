"""Benchmark of network traffic: bytes per training step, from the kernel's counter."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from .network import Link, over_ranks
from .results import Panel, Row, rows
from .variants import REMARKS, Step, Variant, variants
from .workload import Workload, alternate

__all__ = ["bytes_sent", "wire"]

_STEPS = 2


def wire(workload: Workload) -> Panel:
    """Measure the megabytes that a rank sends in a step.  Collective."""
    compared = list(variants(workload.build, workload.batch()))
    sent, setting = bytes_sent(compared, workload.rounds)
    return Panel(
        key="wire",
        title="Bytes on the wire, a step and rank",
        unit="MB",
        rows=sent,
        setting={**setting, **REMARKS},
    )


def bytes_sent(
    compared: Sequence[Variant], rounds: int
) -> tuple[tuple[Row, ...], dict[str, str | int]]:
    """Measure the megabytes that a rank sends in a step.  Collective.

    They include gradients, BatchNorm's buffers, acknowledgements and headers.

    Args:
        compared: the variants, with the baseline first.
        rounds: number of measurements of each variant.

    Returns:
        A row for each variant, and the environment of the measurement, by name.
    """
    link = Link()

    def megabytes(step: Step) -> float:
        dist.barrier()
        before = link.sent_bytes()
        for _ in range(_STEPS):
            step()
        # After the barrier the other rank has received everything that this one sent.
        dist.barrier()
        return (link.sent_bytes() - before) / _STEPS / 1e6

    measured = over_ranks(alternate(compared, rounds, megabytes), dist.ReduceOp.SUM)
    # Each host counts what it sends; the loopback counts both ranks' bytes, and both read it.
    readers = 4 if link.is_loopback else 2
    values = [[total / readers for total in row] for row in measured]
    counter = "tx_bytes of both ranks, lo counts them together" if link.is_loopback else "tx_bytes"
    setting: dict[str, str | int] = {
        "counter": f"{counter} ({link.name})",
        "network": link.network,
        "rounds": len(measured[0]),
    }
    return rows(compared, values), setting
