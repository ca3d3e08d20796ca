"""What a report needs of a run, read from its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..checkpoint.durable_io import read_small
from ..errors import CheckpointError
from ..schema import first_problem
from ..search.convergence import CheckRecord
from ..training.put_aside import JOURNAL, RESULT
from ..training.reporting.journal_lines import CheckLine, read_checks
from ..training.reporting.result import Result
from .run_masks import read_records
from .run_settings import read_description

__all__ = ["Curve", "RunFiles", "is_run", "read_run"]

_MAX_BYTES = 16 << 20
_RESULT = TypeAdapter(Result)

Curve = Sequence[tuple[int, float]]
"""Optimizer steps and values."""


@dataclass(frozen=True, eq=False)
class RunFiles:
    """A run, finished or not.

    Attributes:
        name: the name in the report.
        result: the content of ``result.json``; None if the run has not finished.
        description: the content of ``run.json``; None for runs without it.
        checks: the checks in the journal.
        records: the checks whose masks are in the newest checkpoint.
        curves: the scalars for TensorBoard, by tag.
    """

    name: str
    result: Mapping[str, Any] | None
    description: Mapping[str, Mapping[str, Any]] | None
    checks: Sequence[CheckLine]
    records: Sequence[CheckRecord]
    curves: Mapping[str, Curve]

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """The settings by dotted key; None if they are not known."""
        return None if self.description is None else self.description["settings"]

    @property
    def status(self) -> str:
        return "unfinished" if self.result is None else str(self.result["status"])

    def over_epochs(
        self, tag: str, relative_to: str | None = None
    ) -> tuple[list[float], list[float]]:
        """The epochs and values of a curve; none if it was not recorded.

        Args:
            tag: name of the curve.
            relative_to: name of a curve of the same steps by which to divide.
        """
        test = self.curves.get("test/accuracy", ())
        points = self.curves.get(tag, ())
        if not test or not points:
            return [], []
        whole = dict(self.curves.get(relative_to, ())) if relative_to is not None else {}
        steps_per_epoch = test[0][0]  # tests follow whole epochs
        shown = [(step, value) for step, value in points if relative_to is None or whole.get(step)]
        return (
            [step / steps_per_epoch for step, _ in shown],
            [value / whole.get(step, 1.0) for step, value in shown],
        )


def is_run(folder: Path) -> bool:
    """Whether a folder has the files of a run."""
    return (folder / JOURNAL).is_file() or (folder / RESULT).is_file()


def read_run(folder: Path, name: str) -> RunFiles:
    """Read the files of a run.

    Args:
        folder: the run's folder.
        name: the name in the report.

    Raises:
        CheckpointError: a file is damaged, or missing in a finished run.
    """
    result = folder / RESULT
    checks = read_checks(folder / JOURNAL)
    return RunFiles(
        name=name,
        result=_read_result(result) if result.exists() else None,
        description=read_description(folder),
        checks=checks,
        records=read_records(folder, checks) if checks else (),
        curves=_read_curves(folder),
    )


def _read_result(path: Path) -> dict[str, Any]:
    content = read_small(path, _MAX_BYTES)
    try:
        found = _RESULT.validate_json(content, strict=True)
    except ValidationError as error:
        problem = re.sub(r"\s+", " ", first_problem(error))
        raise CheckpointError(f"{path}: damaged: {problem}") from error
    in_file = json.loads(content)  # what another version did not write must not get a default
    if "status" not in in_file:
        raise CheckpointError(f"{path}: damaged: it has no status")
    return {key: value for key, value in asdict(found).items() if key in in_file}


def _read_curves(folder: Path) -> dict[str, Curve]:
    # Images are in the same files; one of each is kept in memory at a time.
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1}).Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }
