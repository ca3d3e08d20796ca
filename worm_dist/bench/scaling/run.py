"""Runs the benchmark on the ranks that a launcher has started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..json_lines import append
from ..network import several_ranks
from ..workload import QUICK
from .measurement import measure
from .page import write
from .row import read_scale_rows
from .variants import Backend

__all__ = ["ROWS", "run"]

ROWS = "scale.jsonl"


def run(model: str | None, backend: Backend, quick: bool, folder: Path) -> None:
    """Measure; rank zero appends the rows and writes the page.  Every rank calls it.

    Args:
        model: name of the model that is trained on 32x32 images; None for the benchmark's.
        backend: what the ranks train with.
        quick: True for few rounds.
        folder: folder of ``scale.jsonl`` and ``scale.md``; rows of other numbers of ranks and other
            networks are kept.

    Raises:
        BackendError: there is a single rank.
        CheckpointError: the folder has rows of another version.
        ConfigError: the model does not exist.
    """
    workload = replace(QUICK, model=model or QUICK.model, rounds=2 if quick else 8)
    read_scale_rows(folder / ROWS)
    with several_ranks() as rank:
        rows = list(measure(workload, backend))
        if rank == 0:
            for row in rows:
                append(folder / ROWS, row)
            print(write(folder, read_scale_rows(folder / ROWS)))
            print(f"files: {folder}")
