"""Row of the ledger: the figures of one run, stored as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import CheckpointError
from ...training.reporting.recovery import recovery

__all__ = ["Key", "Row", "read_rows"]


@dataclass(frozen=True)
class Key:
    """Unique key of a run; ``prune_ratio`` is 0 for the dense one and with a budget.  ``ranks`` is
    the number of ranks that share each batch."""

    subject: str
    rule: str
    prune_ratio: float
    seed: int
    epochs: int
    ranks: int = 1


@dataclass
class Row:
    """Figures of a run.

    All accuracies are fractions, 0 to 1; those called estimated have BatchNorm statistics
    re-estimated from the newest batches.  While the learning rate is high, running statistics lag
    behind in every network, dense or not: on Fashion-MNIST by one to seven points.

    Attributes:
        key: key of the run.
        accuracies, estimated_accuracies: validation accuracy after every epoch.
        losses: mean training loss of every epoch.
        sent, computed: bytes sent and FLOPs of the forward passes up to the end of every epoch, in
            those of one epoch of the dense network.
        elbow_epoch, ticket_epoch: epochs trained at the elbow, or when truncation started without
            one, and when the ticket was drawn.
        before_pruning: estimated validation accuracy when the first channel began to leave, by
            gradual removal or by a draw.
        before_draw, after_draw: validation accuracies right before and after the last stage of the
            draw, which estimates statistics itself.
        after_one_epoch: estimated validation accuracy one epoch after the draw.
        change_at_draw: largest absolute difference of an output, over all stages.
        widths: number of kept channels of every group; None without a ticket.
        num_parameters, num_flops: those of the final network; FLOPs are of a forward pass of one
            sample.
        parameters, flops: the same as fractions of the dense network's.
        test_accuracy: accuracy of the final network on the test split, on which nothing is chosen;
            None if an error ended the run.
        removed_fraction: removed channels, as a fraction of the dropped ones.
        paused_steps: number of steps in which removal was paused because of the loss.
        error: the error that ended the run; empty if there was none.
        seconds: wall-clock time.
        training_seconds: wall-clock time of the steps, checks and draws of every epoch, without
            evaluations; rows of earlier versions have none.
    """

    key: Key
    accuracies: list[float] = field(default_factory=list)
    estimated_accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    elbow_epoch: float | None = None
    ticket_epoch: float | None = None
    before_pruning: float | None = None
    before_draw: float | None = None
    after_draw: float | None = None
    after_one_epoch: float | None = None
    change_at_draw: float = 0.0
    widths: dict[str, int] | None = None
    num_parameters: int = 0
    num_flops: int = 0
    parameters: float = 1.0
    flops: float = 1.0
    test_accuracy: float | None = None
    removed_fraction: float = 0.0
    paused_steps: int = 0
    error: str = ""
    seconds: float = 0.0
    training_seconds: list[float] = field(default_factory=list)

    @property
    def final(self) -> float:
        """Validation accuracy of the final network."""
        return self.accuracies[-1]

    @property
    def run_flops(self) -> float:
        """FLOPs of the run as a fraction of a dense run's."""
        return self.computed[-1] / len(self.computed)

    @property
    def run_bytes(self) -> float:
        """Bytes of the run as a fraction of a dense run's."""
        return self.sent[-1] / len(self.sent)

    @property
    def recovery(self) -> float | None:
        """Epochs from the draw until the accuracy before pruning is reached again; 0 if the draw
        does not fall below it, None if it is not reached at the end of any epoch."""
        if self.ticket_epoch is None or self.before_pruning is None or self.after_draw is None:
            return None
        tests = enumerate(self.estimated_accuracies, start=1)
        return recovery(self.before_pruning, self.ticket_epoch, self.after_draw, tests)


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file, if it exists, the newest of each key; lines cut short by a kill are
    skipped.

    Raises:
        CheckpointError: another version has written the file.
    """
    rows = {row.key: row for row in _rows(path)} if path.exists() else {}
    return list(rows.values())


def _rows(path: Path) -> Iterator[Row]:
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        try:
            yield Row(key=Key(**values.pop("key")), **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"bench: {path} was not written by this version ({error}); choose another --out"
            ) from error
