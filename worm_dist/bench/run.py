"""Run: one benchmark on two ranks, from the command line to the results on disk."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import checkpoint
from .network import Link, two_ranks
from .overhead import overhead
from .report import read_panels, show, write_panels
from .results import Panel
from .step import step
from .wire import wire
from .workload import FULL, QUICK, Scale
from .zero import zero

__all__ = ["run"]

_BENCHMARKS: Mapping[str, Callable[[Scale], Panel]] = {
    "wire": wire,
    "step": step,
    "overhead": overhead,
    "zero": zero,
    "checkpoint": checkpoint,
}


def run(benchmark: str, quick: bool, folder: Path) -> None:
    """Measure, and report on rank zero.  Both ranks call it.

    Args:
        benchmark: ``wire``, ``step``, ``overhead``, ``zero`` or ``checkpoint``.
        quick: a small network and few rounds.
        folder: for ``bench.json`` and ``bench.png``; what other benchmarks left there stays.

    Raises:
        BackendError: there are not two ranks.
        CheckpointError: the folder holds a ``bench.json`` of another kind.
    """
    scale = QUICK if quick else FULL
    # An unusable folder is told before minutes are spent.
    earlier = read_panels(folder)
    with two_ranks() as rank:
        if rank == 0 and Link().is_loopback:
            print("bench: both ranks are on one host, over lo; launch/netlab gives each its own")
        panel = _BENCHMARKS[benchmark](scale)
        if rank == 0:
            panel = replace(panel, setting={**_setting(scale), **panel.setting})
            show(panel)
            write_panels(folder, earlier, panel)
            print(f"files: {folder}")


def _setting(scale: Scale) -> dict[str, str | int]:
    """What is the same for all of them."""
    parameters = sum(p.numel() for p in scale.build().parameters())
    return {
        "network trained": f"{scale.model}, {parameters:,} parameters, 2 images a rank",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }
