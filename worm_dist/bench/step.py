"""Benchmarks of step time: of all variants, and of packed beside whole buckets."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch.distributed as dist

from ..errors import ConfigError
from .network import Link, over_ranks
from .results import Panel, rows
from .variants import REMARKS, Step, Variant, packed_and_whole, variants
from .workload import Workload, alternate

__all__ = ["packing", "seconds_of", "step"]


class _Times(NamedTuple):
    """Seconds of a step, and processor seconds of all threads of the process."""

    seconds: float
    processor_seconds: float


def step(workload: Workload) -> Panel:
    """Measure the seconds of a step of all variants, forward pass to optimizer.  Collective."""
    return _panel("step", workload, variants(workload.build, workload.batch(), workload.wants))


def packing(workload: Workload) -> Panel:
    """Measure the seconds of a step with packed and with whole buckets.  Collective."""
    return _panel(
        "packing", workload, packed_and_whole(workload.build, workload.batch(), workload.wants)
    )


def _panel(kind: str, workload: Workload, compared: Iterable[Variant]) -> Panel:
    link = Link()
    all_variants = list(compared)
    unknown = {*workload.only}.difference(variant.name for variant in all_variants)
    if unknown:
        raise ConfigError(f"--only: there is no variant {min(unknown)!r}; see bench {kind} --quick")
    measured = alternate(all_variants, workload.rounds, _times_of)
    seconds = [[each.seconds for each in row] for row in measured]
    processor_seconds = [[each.processor_seconds for each in row] for row in measured]
    return Panel(
        key=f"{kind} {link.network}",
        title=f"Seconds a step, over {link}",
        unit="s",
        rows=rows(
            all_variants,
            over_ranks(seconds, dist.ReduceOp.MAX),
            over_ranks(processor_seconds, dist.ReduceOp.SUM),
        ),
        setting={
            "network": link.network,
            "rounds": len(measured[0]),
            **(REMARKS if kind == "step" else {}),
        },
    )


def seconds_of(step: Step) -> float:
    """Seconds of one step on this rank; a barrier synchronizes the start."""
    return _times_of(step).seconds


def _times_of(step: Step) -> _Times:
    dist.barrier()
    begin, processor_begin = time.perf_counter(), time.process_time()
    step()
    return _Times(time.perf_counter() - begin, time.process_time() - processor_begin)
