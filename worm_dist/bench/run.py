"""Runs one benchmark on two ranks and writes its results."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import checkpoint
from .hiccup import hiccup
from .network import Link, two_ranks
from .overhead import overhead
from .report import read_panels, show, write_panels
from .results import Panel
from .step import step
from .wire import wire
from .workload import FULL, QUICK, Workload
from .zero import zero

__all__ = ["run"]

_BENCHMARKS: Mapping[str, Callable[[Workload], Panel]] = {
    "wire": wire,
    "step": step,
    "overhead": overhead,
    "hiccup": hiccup,
    "zero": zero,
    "checkpoint": checkpoint,
}


def run(benchmark: str, quick: bool, folder: Path) -> None:
    """Run a benchmark; rank zero prints and writes the results.  Both ranks call it.

    Args:
        benchmark: ``wire``, ``step``, ``overhead``, ``hiccup``, ``zero`` or ``checkpoint``.
        quick: True for a small network and few rounds.
        folder: folder of ``bench.json`` and ``bench.png``; results of other benchmarks are kept.

    Raises:
        BackendError: the world size is not 2.
        CheckpointError: the folder has a ``bench.json`` of another format.
    """
    workload = QUICK if quick else FULL
    # Read first, so that an unusable folder is reported before minutes are spent.
    earlier = read_panels(folder)
    with two_ranks() as rank:
        if rank == 0 and Link().is_loopback:
            print("bench: both ranks are on one host, over lo; launch/netlab gives each its own")
        panel = _BENCHMARKS[benchmark](workload)
        if rank == 0:
            panel = replace(panel, setting={**_setting(workload), **panel.setting})
            show(panel)
            write_panels(folder, earlier, panel)
            print(f"files: {folder}")


def _setting(workload: Workload) -> dict[str, str | int]:
    """The environment that is common to all benchmarks."""
    parameters = sum(p.numel() for p in workload.build().parameters())
    return {
        "network trained": f"{workload.model}, {parameters:,} parameters, 2 images a rank",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }
