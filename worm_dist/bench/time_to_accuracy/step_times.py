"""Step times: how long the parts of a run take over one network, as lines of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..json_lines import read
from ..ledger.row import Row

__all__ = ["StepTimes", "read_step_times"]


@dataclass(frozen=True)
class StepTimes:
    """Times of the parts of a run, each that of the slower rank.

    Attributes:
        subject, rule, prune_ratio: what was run.
        ranks: number of ranks.
        network: rate of the link between them, such as ``100mbit``; ``lo`` for the loopback.
        steps: seconds of a step, by phase: the tenth percentile, which other load of the machine
            hardly changes.
        mean_steps: mean seconds of a step, by phase, with what other load has delayed.
        num_steps: number of measured steps, by phase.
        wire_bytes: median bytes of a step that left a rank's interface, by phase; empty over the
            loopback, whose counter has all traffic of the machine.
        check_seconds: seconds of a check in the search; 0 without one.
        removal_seconds: seconds of the whole removal beyond its steps: the start of truncation, the
            stages of the draw with their checks, and what the two steps after each take longer.
    """

    subject: str
    rule: str
    prune_ratio: float
    ranks: int
    network: str
    steps: Mapping[str, float]
    mean_steps: Mapping[str, float]
    num_steps: Mapping[str, int]
    wire_bytes: Mapping[str, float]
    check_seconds: float
    removal_seconds: float

    def seconds_of(self, row: Row, steps_per_epoch: int, *, disturbed: bool = False) -> list[float]:
        """Seconds from the start of a run to the end of every epoch: the steps of each phase times
        the seconds of such a step, and the measured checks and draws.

        Args:
            row: the run.
            steps_per_epoch: optimizer steps in an epoch.
            disturbed: True to compose mean times of steps, as of a run beside other load.
        """
        per_step = self.mean_steps if disturbed else self.steps
        end = len(row.accuracies)
        drawn = end if row.ticket_epoch is None else row.ticket_epoch
        elbow = drawn if row.elbow_epoch is None else row.elbow_epoch
        first = "dense" if "dense" in self.steps else "search"
        composed = []
        for epoch in range(1, end + 1):
            epochs = {
                first: min(epoch, elbow),
                "truncate": min(epoch, drawn) - min(epoch, elbow),
                "ticket": epoch - min(epoch, drawn),
            }
            seconds = sum(
                each * steps_per_epoch * per_step[phase] for phase, each in epochs.items() if each
            )
            seconds += int(epochs[first]) * self.check_seconds
            if row.ticket_epoch is not None and epoch > elbow:
                # In proportion to the removal so far; at once where it takes no time.
                share = epochs["truncate"] / (drawn - elbow) if drawn > elbow else 1.0
                seconds += share * self.removal_seconds
            elif row.ticket_epoch is not None and epoch == drawn == elbow:
                seconds += self.removal_seconds
            composed.append(seconds)
        return composed


def read_step_times(path: Path) -> list[StepTimes]:
    """Read the lines of a file, if it exists; the newest of each rule and network.

    Raises:
        CheckpointError: another version has written the file.
    """
    newest = {
        (each.subject, each.rule, each.prune_ratio, each.ranks, each.network): each
        for each in read(path, StepTimes)
    }
    return list(newest.values())
