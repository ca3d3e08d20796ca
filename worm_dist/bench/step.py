"""Step: seconds that a training step takes."""

from __future__ import annotations

import time

import torch.distributed as dist

from .network import Link, over_ranks
from .results import Panel, rows
from .variants import REMARKS, Step, variants
from .workload import Scale, alternate

__all__ = ["seconds_of", "step"]


def step(scale: Scale) -> Panel:
    """Seconds from the forward pass to the end of the optimizer's step.  Collective."""
    link = Link()
    running = list(variants(scale.build, scale.batch()))
    measured = alternate(running, scale.rounds, seconds_of)
    return Panel(
        key=f"step {link.network}",
        title=f"Seconds a step, over {link}",
        unit="s",
        rows=rows(running, over_ranks(measured, dist.ReduceOp.MAX)),
        setting={"network": link.network, "rounds": len(measured[0]), **REMARKS},
    )


def seconds_of(step: Step) -> float:
    """How long one step takes this rank; both begin together."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
