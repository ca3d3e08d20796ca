"""Benchmark of checkpointing: cost of a synchronous and of an asynchronous save."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ..checkpoint.async_save import AsyncSaver
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.manifest import CheckpointInfo
from ..models import build_model
from .network import Link, over_ranks
from .results import Panel, rows
from .step import seconds_of
from .variants import Step, Variant, dense, training
from .workload import Workload, alternate

__all__ = ["checkpoint"]

_STEPS = 2
"""Training steps for each save."""
Save = Callable[[Mapping[str, Any]], object]


def checkpoint(workload: Workload) -> Panel:
    """Measure the seconds of a few steps with and without a save.  Collective."""

    def build() -> nn.Module:
        return build_model(workload.checked_model, 10, 3)

    model, optimizer = training(build)
    step = dense(model, optimizer, workload.batch())
    info = CheckpointInfo(step=0, world_size=dist.get_world_size(), phase="dense")
    background = AsyncSaver()
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(folder)
        saves: dict[str, Save] = {
            "no save": lambda states: None,
            "saved in between": lambda states: manager.save(info, states),
            "saved in the background": lambda states: background.save(
                states, lambda copies: manager.save(info, copies)
            ),
        }
        waits: dict[str, list[float]] = {name: [] for name in saves}

        def with_save(name: str) -> Step:
            def steps() -> None:
                states = {"run": {"model": model.state_dict(), "optimizer": optimizer.state_dict()}}
                begin = time.perf_counter()
                if dist.get_rank() == 0:
                    saves[name](states)
                waits[name].append(time.perf_counter() - begin)
                for _ in range(_STEPS):
                    step()
                background.finish()

            return steps

        variants = [Variant(name, with_save(name), lambda: None, None) for name in saves]
        measured = alternate(variants, workload.rounds, seconds_of)
        size = sum(path.stat().st_size for path in Path(folder).glob("*/*"))
    return Panel(
        key="checkpoint",
        title=f"Seconds for {_STEPS} steps and a save",
        unit="s",
        rows=rows(variants, over_ranks(measured, dist.ReduceOp.MAX)),
        setting={
            "network that is saved": workload.checked_model,
            "network": Link().network,
            "rounds": len(measured[0]),
            "disk": f"that of {Path(folder).parent}",
        },
        figures={
            "checkpoint (MB)": size / 1e6,
            **{
                f"training waits, {name} (ms)": 1000
                * statistics.median(waits[name][-len(measured[0]) :])
                for name in saves
            },
        },
    )
