"""Storage: whether the run's folder can be written to, and has room for its checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn

from ..pruning.recorded_inputs import most_recorded_bytes
from ..training.run_config import RunConfig
from .finding import Finding, ok

__all__ = ["checkpoint_bytes", "storage"]

_BYTES_OF_A_FLOAT = 4


def checkpoint_bytes(config: RunConfig, network: nn.Module, batch_bytes: int, ranks: int) -> int:
    """Estimated size of a checkpoint of the dense network: weights and buffers, moments, and each
    rank's recorded inputs.

    Args:
        config: the run's settings.
        network: the dense network.
        batch_bytes: size of a rank's batch.
        ranks: number of ranks.
    """
    trained = sum(p.numel() for p in network.parameters())
    state = [*network.parameters(), *network.buffers()]
    moments = {"sgd": int(config.optimizer.momentum > 0)}.get(config.optimizer.name, 2)
    recorded = most_recorded_bytes(
        config.ticket.recalibrate_batches, config.ticket.recalibrate_memory_mb << 20, batch_bytes
    )
    inputs = ranks * recorded if config.search.enabled else 0
    return sum(t.nbytes for t in state) + moments * trained * _BYTES_OF_A_FLOAT + inputs


def storage(out: Path, config: RunConfig, bytes_each: int) -> Finding:
    """Compare the free space with the checkpoints that are there at the same time: those that are
    kept, the best one, and one that is being written.

    Args:
        out: the run's folder, which need not be there yet.
        config: the run's settings.
        bytes_each: estimated size of one.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding("storage", "problem", f"{place} cannot be written to; give another --out")
    number, free = config.checkpoint.keep_last + 2, shutil.disk_usage(place).free
    text = (
        f"{out}: {_size(free)} are free; {number} checkpoints take about "
        f"{_size(number * bytes_each)}"
    )
    if free < number * bytes_each:
        return Finding(
            "storage",
            "problem",
            f"{text}: make room there, give another --out, or lower checkpoint.keep_last",
        )
    return ok("storage", text)


def _size(value: int) -> str:
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
