"""The run's journal: one line of JSON for every check, removal, stage and phase change."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...groups.mask import Mask
from ...search.convergence import CheckRecord
from ...verdict import Phase, Verdict

__all__ = ["Journal"]


class Journal:
    """Appends to ``journal.jsonl``; every line is in the file when the call returns.

    Args:
        path: path of the file.
        rule: the elbow rule.
        size: size of the journal at the checkpoint, in bytes.  Lines after it are removed, as the
            resumed run writes them again.
    """

    def __init__(self, path: Path, rule: str, size: int) -> None:
        self._path = path
        self._rule = rule
        if self.size > size:
            os.truncate(path, size)

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._path.stat().st_size if self._path.exists() else 0

    def check(
        self,
        epoch: float,
        record: CheckRecord,
        mask: Mask,
        verdict: Verdict,
        budget_reached: float | None,
    ) -> None:
        self._write(
            event="check",
            epoch=epoch,
            step=record.step,
            distances=record.distances,
            distance_mean=record.distance_mean,
            distance_max=record.distance_max,
            rule=self._rule,
            threshold=record.threshold,
            elbow=verdict.elbow,
            settled=record.settled,
            ticket=verdict.ticket,
            phase=verdict.phase,
            generation=verdict.generation,
            live_fraction=verdict.live_fraction,
            budget_reached=budget_reached,
            mask_digest=mask.digest,
            floored=record.floored,
        )

    def phase(self, epoch: float, step: int, phase: Phase) -> None:
        self._write(event="phase", epoch=epoch, step=step, phase=phase)

    def removal(self, epoch: float, step: int, verdict: Verdict) -> None:
        self._write(
            event="removal",
            epoch=epoch,
            step=step,
            generation=verdict.generation,
            live_fraction=verdict.live_fraction,
            removed_fraction=verdict.removed_fraction,
            paused=verdict.paused,
        )

    def stage(self, epoch: float, step: int, num_parameters: int) -> None:
        self._write(event="stage", epoch=epoch, step=step, parameters=num_parameters)

    def _write(self, **entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
