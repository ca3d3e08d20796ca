"""Run: the rows that are asked for, as many at a time as there are cores for, each kept when it is
done."""

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

__all__ = ["Order", "one_rank", "run"]

_ROWS, _TABLE = "ledger.jsonl", "ledger.md"


@dataclass(frozen=True)
class Order:
    """A row that is wanted; ``epochs`` are the subject's own if None."""

    subject: str
    rule: Rule
    prune_ratio: float
    seed: int
    epochs: int | None = None

    @property
    def key(self) -> Key:
        return Key(self.subject, self.rule.name, self.prune_ratio, self.seed)


def run(orders: Sequence[Order], folder: Path, num_workers: int) -> list[Row]:
    """Train what is not in the folder yet; its rows and its table are complete then.

    Args:
        orders: of all rows.
        folder: of ``ledger.jsonl`` and ``ledger.md``.
        num_workers: processes; each has one thread.
    """
    there = {row.key for row in read_rows(folder / _ROWS)}
    missing = [order for order in orders if order.key not in there]
    spawned = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(num_workers, spawned) as pool,
        rich.progress.Progress() as progress,
    ):
        task = progress.add_task("rows", total=len(missing))
        for done in as_completed(pool.submit(_row, order) for order in missing):
            row = done.result()
            append(folder / _ROWS, row)
            final = f"{row.final:.4f}" if row.accuracies else "-"
            progress.console.print(f"{row.key}: {final} in {row.seconds:.0f} s {row.error}")
            progress.advance(task)
    wanted = [order.key for order in orders]
    rows = [row for row in read_rows(folder / _ROWS) if row.key in wanted]
    rows.sort(key=lambda row: wanted.index(row.key))
    (folder / _TABLE).write_text(markdown(rows))
    return rows


def _row(order: Order) -> Row:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with one_rank():
        return train(
            SUBJECTS[order.subject], order.rule, order.prune_ratio, order.seed, order.epochs
        )


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
