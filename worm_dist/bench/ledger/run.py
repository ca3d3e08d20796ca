"""Trains the requested rows in parallel processes and stores each when it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import rich.progress

from ..json_lines import append
from ..local_ranks import on_ranks, process_context
from .row import Key, Row, read_rows
from .spec import RunSpec
from .training import train

__all__ = ["ROWS", "missing", "run"]

ROWS = "ledger.jsonl"


def missing(specs: Sequence[RunSpec], folder: Path) -> list[RunSpec]:
    """The runs that have no row in the folder yet.

    Raises:
        CheckpointError: another version has written its rows.
    """
    existing = {row.key for row in read_rows(folder / ROWS)}
    return [spec for spec in specs if spec.key not in existing]


def run(specs: Sequence[RunSpec], folder: Path, num_workers: int) -> list[Row]:
    """Train the runs that are missing in the folder; each begins when the row that it depends on is
    there.

    Args:
        specs: the specifications of all runs, with those that they depend on.
        folder: folder of ``ledger.jsonl``.
        num_workers: number of runs at a time; every rank of a run is a process with one thread.

    Returns:
        The rows of all runs, in the order of ``specs``.
    """
    rows = {row.key: row for row in read_rows(folder / ROWS)}
    waiting = missing(specs, folder)
    with rich.progress.Progress() as progress, _workers(num_workers) as pool:
        task = progress.add_task("rows", total=len(waiting))
        running = set[Future[Row]]()
        while waiting or running:
            ready = [spec for spec in waiting if spec.parent is None or spec.parent in rows]
            # No more than there are workers, so that controls come before the next seed.
            ready = ready[: num_workers - len(running)]
            waiting = [spec for spec in waiting if spec not in ready]
            running |= {pool.submit(_row, spec, _parent(spec, rows)) for spec in ready}
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for row in (each.result() for each in done):
                append(folder / ROWS, row)
                rows[row.key] = row
                progress.console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
                progress.advance(task)
    return [rows[spec.key] for spec in specs]


def _line(row: Row) -> str:
    key, final = row.key, f"{row.final:.4f}" if row.accuracies else "–"
    run = f"{key.subject}, p = {key.prune_ratio:g}, seed {key.seed}, {key.rule}"
    return f"{run}: {row.error or final} in {row.seconds:.0f} s"


def _parent(spec: RunSpec, rows: dict[Key, Row]) -> Row | None:
    return None if spec.parent is None else rows[spec.parent]


@contextmanager
def _workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that begin no further run after an error."""
    pool = ProcessPoolExecutor(number, process_context())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _row(spec: RunSpec, parent: Row | None) -> Row:
    return on_ranks(spec.ranks, train, spec, parent)
