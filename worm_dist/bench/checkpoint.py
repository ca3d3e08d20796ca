"""Checkpoint: what a save takes of training, written in between or in the background."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ..checkpoint.async_save import Background
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.manifest import CheckpointInfo
from ..models import build_model
from .network import Link, over_ranks
from .results import Panel, rows
from .step import seconds_of
from .variants import Step, Variant, dense, training
from .workload import Scale, alternate

__all__ = ["checkpoint"]

_STEPS = 2
"""Of training for each save."""
Save = Callable[[Mapping[str, Any]], object]


def checkpoint(scale: Scale) -> Panel:
    """Seconds of a few steps with and without a save among them.  Collective."""

    def build() -> nn.Module:
        return build_model(scale.model_of_checks, 10, 3)

    model, optimizer = training(build)
    step = dense(model, optimizer, scale.batch())
    about = CheckpointInfo(
        step=0, world_size=dist.get_world_size(), phase="dense", config_digest=""
    )
    background = Background()
    with tempfile.TemporaryDirectory() as folder:
        shelf = CheckpointManager(folder)
        saves: dict[str, Save] = {
            "no save": lambda states: None,
            "saved in between": lambda states: shelf.save(about, states),
            "saved in the background": lambda states: background.save(
                states, lambda copies: shelf.save(about, copies)
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

        running = [Variant(name, with_save(name), lambda: None, None) for name in saves]
        measured = alternate(running, scale.rounds, seconds_of)
        size = sum(path.stat().st_size for path in Path(folder).glob("*/*"))
    return Panel(
        key="checkpoint",
        title=f"Seconds for {_STEPS} steps and a save",
        unit="s",
        rows=rows(running, over_ranks(measured, dist.ReduceOp.MAX)),
        setting={
            "network that is saved": scale.model_of_checks,
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
