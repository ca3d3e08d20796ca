"""The masks of a run's checks, from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ..checkpoint.manager import CheckpointManager
from ..config import SearchConfig
from ..errors import CheckpointError
from ..schema import first_problem
from ..search.convergence import CheckRecord, History, HistorySchema
from ..training.checkpointer import RUN
from ..training.put_aside import CHECKPOINTS
from ..training.reporting.journal_lines import CheckLine

__all__ = ["read_records"]


def read_records(folder: Path, checks: Sequence[CheckLine]) -> tuple[CheckRecord, ...]:
    """The records of a run's checks, with their masks; those of the newest ones may be missing, as
    a run saves less often than it checks.  Empty without a checkpoint.

    Args:
        folder: the run's folder.
        checks: the checks in its journal.

    Raises:
        CheckpointError: the checkpoint is not one of a run, or not of the journal's run.
    """
    newest = CheckpointManager(folder / CHECKPOINTS).newest()
    if newest is None:
        return ()
    try:
        state = newest.read(RUN)["engine"]["history"]
        HistorySchema.model_validate(state)
    except ValidationError as error:
        raise CheckpointError(f"{newest.path}: {first_problem(error)}") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{newest.path}: not the state of a run: no history") from error
    history = History(SearchConfig())  # whose settings do not matter for what is recorded
    history.load_state_dict(state)
    lines = [(line.step, line.distances) for line in checks]
    saved = [(record.step, tuple(record.distances)) for record in history.records]
    if saved != lines[: len(saved)]:
        raise CheckpointError(f"{newest.path}: its checks are not those of the journal in {folder}")
    return history.records
