"""Asynchronous checkpoints of a run, written by rank zero in the background."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.async_save import AsyncSaver
from ..checkpoint.lease import Lease
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.manifest import CheckpointInfo
from ..errors import CheckpointError
from .reporting.failed_writes import FailedWrites
from .resume_config import fixed_settings
from .run_config import RunConfig
from .run_folder import CHECKPOINTS, SETTINGS

__all__ = ["RUN", "Checkpointer"]

logger = logging.getLogger(__name__)

RUN = "run"
"""Name of the checkpoint part that holds ``Trainer.state_dict()``."""


class Checkpointer:
    """Saves the state of a run in the background; every rank calls the same methods.

    At most one save is in flight.  An error of a save is raised by the next call of ``save`` or
    ``finish``.

    Args:
        folder: the run's folder; only rank zero's value is used.
        config: the run's settings.
        failed_writes: records failed saves if ``checkpoint.on_error`` is ``continue``.
        lease: the folder's lock on rank zero, which must be held to write there; else None.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        failed_writes: FailedWrites,
        lease: Lease | None,
    ) -> None:
        self._settings = fixed_settings(config)
        self._continue_on_error = config.checkpoint.on_error == "continue"
        self._manager = CheckpointManager(folder / CHECKPOINTS, config.checkpoint.keep_last)
        self._background = AsyncSaver()
        self._failed_writes = failed_writes
        self._lease = lease

    def save(self, state: Any, step: int, phase: str, value: float | None) -> None:
        """Copy a state and start writing it in the background.  Collective.

        Args:
            state: the run's state on rank zero; ignored on other ranks.
            step: optimizer steps taken.
            phase: the engine's phase.
            value: accuracy, 0 to 1, by which the best checkpoint is kept; None if not measured.

        Raises:
            CheckpointError: the previous save failed; raised on all ranks.
            ConfigError: another run has taken the folder over; raised on rank zero.
        """
        self.finish()
        if self._lease is None:
            return
        self._lease.require()
        info = CheckpointInfo(
            step=step,
            world_size=dist.get_world_size(),
            phase=phase,
            value=value,
        )
        parts = {RUN: state, SETTINGS: self._settings}
        self._background.save(parts, lambda copies: self._manager.save(info, copies))

    def finish(self) -> None:
        """Wait until the save in flight is written.  Collective.

        Raises:
            CheckpointError: the save failed and ``checkpoint.on_error`` is ``stop``; raised on all
                ranks.
        """
        failures: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._background.finish()
            except CheckpointError as error:
                failures = [str(error)]
        dist.broadcast_object_list(failures, src=0)
        (failure,) = failures
        if failure is None:
            return
        if not self._continue_on_error:
            raise CheckpointError(failure)
        if dist.get_rank() == 0:
            logger.warning("%s; training goes on", failure)
            self._failed_writes.record(CHECKPOINTS, failure)
