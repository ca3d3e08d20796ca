"""Wire: bytes that a training step puts on the network, as the kernel counts them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from .network import Link, over_ranks
from .results import Panel, Row, rows
from .variants import REMARKS, Step, Variant, variants
from .workload import Scale, alternate

__all__ = ["bytes_sent", "wire"]

_STEPS = 2


def wire(scale: Scale) -> Panel:
    """Megabytes that a rank sends in a step.  Collective."""
    running = list(variants(scale.build, scale.batch()))
    sent, setting = bytes_sent(running, scale.rounds)
    return Panel(
        key="wire",
        title="Bytes on the wire, a step and rank",
        unit="MB",
        rows=sent,
        setting={**setting, **REMARKS},
    )


def bytes_sent(
    running: Sequence[Variant], rounds: int
) -> tuple[tuple[Row, ...], dict[str, str | int]]:
    """What a rank sends in a step, in megabytes: gradients, BatchNorm's buffers, acknowledgements
    and the headers that the kernel counts.  Collective.

    Returns:
        A row for each contender, and how they were measured.
    """
    link = Link()

    def megabytes(step: Step) -> float:
        dist.barrier()
        before = link.sent_bytes()
        for _ in range(_STEPS):
            step()
        # The other rank has everything that this one sent, or it would not have come here.
        dist.barrier()
        return (link.sent_bytes() - before) / _STEPS / 1e6

    measured = over_ranks(alternate(running, rounds, megabytes), dist.ReduceOp.SUM)
    # Each host counts what it sends; the loopback counts both ranks' bytes, and each of them reads.
    readers = 4 if link.is_loopback else 2
    values = [[both / readers for both in mine] for mine in measured]
    how = "tx_bytes of both ranks, lo counts them together" if link.is_loopback else "tx_bytes"
    setting: dict[str, str | int] = {
        "counter": f"{how} ({link.name})",
        "network": link.network,
        "rounds": len(measured[0]),
    }
    return rows(running, values), setting
