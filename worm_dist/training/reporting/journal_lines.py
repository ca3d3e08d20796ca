"""Lines of a journal: the schema of its checks, and reading them."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...checkpoint.durable_io import read_small
from ...errors import CheckpointError
from ...schema import Count, Finite, first_problem

__all__ = ["CheckLine", "read_checks"]

_MAX_BYTES = 256 << 20


class CheckLine(BaseModel):
    """The line of a check, as far as it is read.

    Attributes:
        epoch: epochs trained.
        step: optimizer steps taken.
        distances: the distances of the mask to the older ones in the window, oldest first, 0 to 1.
        distance_mean, distance_max: their mean and maximum; None before the second mask.
        rule: the run's elbow rule.
        threshold: the mean distance below which it fires; None for rules without one.
        elbow: whether truncation started at this check.
        settled: whether the mask had settled.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    epoch: Finite
    step: Count
    distances: tuple[Finite, ...]
    distance_mean: Finite | None
    distance_max: Finite | None
    rule: str
    threshold: Finite | None
    elbow: bool
    settled: bool


def read_checks(path: Path) -> list[CheckLine]:
    """Read the lines of checks.  An incomplete last line, which a run may be about to write or was
    killed at, is left out.

    Args:
        path: path of the journal.

    Raises:
        CheckpointError: the file is missing, or a line is not that of a journal.
    """
    *lines, _ = read_small(path, _MAX_BYTES).split(b"\n")
    checks = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["event"] == "check":
                checks.append(CheckLine.model_validate_json(line))
        except ValidationError as error:
            raise _not_a_journal(path, number, first_problem(error)) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _not_a_journal(path, number, "not an event of a run") from error
    return checks


def _not_a_journal(path: Path, number: int, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: line {number}: {problem}; give the journal.jsonl of a run, or the run's folder"
    )
