"""Benchmark of step time."""

from __future__ import annotations

import time

import torch.distributed as dist

from .network import Link, over_ranks
from .results import Panel, rows
from .variants import REMARKS, Step, variants
from .workload import Workload, alternate

__all__ = ["seconds_of", "step"]


def step(workload: Workload) -> Panel:
    """Measure the seconds of a step of all variants, forward pass to optimizer.  Collective."""
    link = Link()
    all_variants = list(variants(workload.build, workload.batch()))
    measured = alternate(all_variants, workload.rounds, seconds_of)
    return Panel(
        key=f"step {link.network}",
        title=f"Seconds a step, over {link}",
        unit="s",
        rows=rows(all_variants, over_ranks(measured, dist.ReduceOp.MAX)),
        setting={"network": link.network, "rounds": len(measured[0]), **REMARKS},
    )


def seconds_of(step: Step) -> float:
    """Seconds of one step on this rank; a barrier synchronizes the start."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
