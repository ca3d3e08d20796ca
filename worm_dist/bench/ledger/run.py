"""Trains the requested rows in parallel processes and stores each when it is done."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rich.progress
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from .row import Key, Row, append, read_rows
from .rule import Rule
from .subject import SUBJECTS
from .table import markdown
from .training import train

__all__ = ["RunSpec", "one_rank", "run"]

_ROWS, _TABLE = "ledger.jsonl", "ledger.md"


@dataclass(frozen=True)
class RunSpec:
    """Specification of a run; ``epochs`` defaults to the subject's."""

    subject: str
    rule: Rule
    prune_ratio: float
    seed: int
    epochs: int | None = None

    @property
    def key(self) -> Key:
        return Key(self.subject, self.rule.name, self.prune_ratio, self.seed)


def run(specs: Sequence[RunSpec], folder: Path, num_workers: int) -> list[Row]:
    """Train the runs that are missing in the folder, and write the table.

    Args:
        specs: the specifications of all runs.
        folder: folder of ``ledger.jsonl`` and ``ledger.md``.
        num_workers: number of processes, each with one thread.

    Returns:
        The rows of all runs, in the order of ``specs``.
    """
    existing = {row.key for row in read_rows(folder / _ROWS)}
    missing = [spec for spec in specs if spec.key not in existing]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(num_workers, context) as pool,
        rich.progress.Progress() as progress,
    ):
        task = progress.add_task("rows", total=len(missing))
        for done in as_completed(pool.submit(_row, spec) for spec in missing):
            row = done.result()
            append(folder / _ROWS, row)
            final = f"{row.final:.4f}" if row.accuracies else "-"
            progress.console.print(f"{row.key}: {final} in {row.seconds:.0f} s {row.error}")
            progress.advance(task)
    keys = [spec.key for spec in specs]
    rows = [row for row in read_rows(folder / _ROWS) if row.key in keys]
    rows.sort(key=lambda row: keys.index(row.key))
    (folder / _TABLE).write_text(markdown(rows))
    return rows


def _row(spec: RunSpec) -> Row:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with one_rank():
        return train(SUBJECTS[spec.subject], spec.rule, spec.prune_ratio, spec.seed, spec.epochs)


@contextmanager
def one_rank() -> Iterator[None]:
    """Process group with a world size of 1."""
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
