"""Runs one benchmark on two ranks and writes its results."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .checkpoint import checkpoint
from .compute import compute
from .fsdp import fsdp
from .hiccup import hiccup
from .network import Link, two_ranks
from .overhead import overhead
from .report import read_panels, show, write_panels
from .results import Panel
from .step import packing, step
from .wire import wire
from .workload import FULL, QUICK, Workload
from .zero import zero

__all__ = ["run"]

_BENCHMARKS: Mapping[str, Callable[[Workload], Panel]] = {
    "wire": wire,
    "step": step,
    "packing": packing,
    "overhead": overhead,
    "hiccup": hiccup,
    "zero": zero,
    "fsdp": fsdp,
    "checkpoint": checkpoint,
    "compute": compute,
}


def run(benchmark: str, quick: bool, changes: Mapping[str, Any], folder: Path) -> None:
    """Run a benchmark; rank zero prints and writes the results.  Both ranks call it.

    Args:
        benchmark: a key of ``_BENCHMARKS``.
        quick: True for a small network and few rounds.
        changes: attributes of the workload to replace.
        folder: folder of ``bench.json`` and ``bench.png``; results of other benchmarks are kept.

    Raises:
        BackendError: the world size is not 2.
        ConfigError: the model or a variant does not exist.
        CheckpointError: the folder has a ``bench.json`` of another format.
    """
    workload = replace(QUICK if quick else FULL, **changes)
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
        "network trained": f"{workload}; {parameters:,} parameters",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }
