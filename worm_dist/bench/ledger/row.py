"""Row of the ledger: the figures of one run, stored as a line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["Key", "Row", "append", "read_rows"]


@dataclass(frozen=True)
class Key:
    """Unique key of a run."""

    subject: str
    rule: str
    prune_ratio: float
    seed: int


@dataclass
class Row:
    """Figures of a run.

    Attributes:
        key: key of the run.
        accuracies: validation accuracy after every epoch, 0 to 1.
        estimated_accuracies: the same with BatchNorm statistics re-estimated from the epoch's last
            batches.  While the learning rate is high, running statistics lag behind in every
            network, dense or not: on Fashion-MNIST by one to seven points.
        losses: mean training loss of every epoch.
        elbow_epoch, ticket_epoch: epochs trained when truncation started and the ticket was drawn.
        before_draw, after_draw: accuracies right before and after the last stage of the draw.
        change_at_draw: largest absolute difference of an output, over all stages.
        parameters, flops: parameters and FLOPs of the final network, as fractions of the dense
            network's.
        run_flops, run_bytes: FLOPs and bytes of all steps, as fractions of a dense run's.
        removed_fraction: removed channels, as a fraction of the dropped ones.
        paused_steps: number of steps in which removal was paused because of the loss.
        error: the error that ended the run; empty if there was none.
        seconds: wall-clock time.
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
    removed_fraction: float = 0.0
    paused_steps: int = 0
    error: str = ""
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.accuracies[-1]


def append(path: Path, row: Row) -> None:
    """Append a row to the file and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file, if it exists; lines cut short by a kill are skipped."""
    return list(_rows(path.read_text().splitlines())) if path.exists() else []


def _rows(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        yield Row(key=Key(**values.pop("key")), **values)
