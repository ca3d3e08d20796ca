"""Row: one run of the ledger, as a line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["Key", "Row", "append", "read_rows"]


@dataclass(frozen=True)
class Key:
    """Which run: no two rows have the same."""

    subject: str
    rule: str
    prune_ratio: float
    seed: int


@dataclass
class Row:
    """What came of it.

    Attributes:
        key: which run.
        accuracies, losses: of every epoch: share of the validation split, mean of the training.
        estimated_accuracies: the same with BatchNorm statistics of the epoch's last batches.  While
            the learning rate is high, running ones lag behind in every network, dense or not: on
            Fashion-MNIST by one to seven points.
        elbow_epoch, ticket_epoch: epochs trained when truncation started and the ticket was drawn.
        before_draw, after_draw: accuracies right before and after the last stage of the draw.
        change_at_draw: largest difference of an output, over all stages.
        parameters, flops: of the network that is left, as shares of the dense one's.
        run_flops, run_bytes: of all steps, as shares of dense steps'.
        left_fraction: dropped channels that have left.
        paused_steps: in which no channel began because of the loss.
        error: what ended the run before its time; empty if nothing did.
        seconds: on the clock.
    """

    key: Key
    accuracies: list[float] = field(default_factory=list)
    estimated_accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    elbow_epoch: float | None = None
    ticket_epoch: float | None = None
    before_draw: float | None = None
    after_draw: float | None = None
    change_at_draw: float = 0.0
    parameters: float = 1.0
    flops: float = 1.0
    run_flops: float = 1.0
    run_bytes: float = 1.0
    left_fraction: float = 0.0
    paused_steps: int = 0
    error: str = ""
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.accuracies[-1]


def append(path: Path, row: Row) -> None:
    """Add a line; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that may not be there yet; a line that a kill has cut short is not one."""
    return list(_rows(path.read_text().splitlines())) if path.exists() else []


def _rows(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        yield Row(key=Key(**values.pop("key")), **values)
