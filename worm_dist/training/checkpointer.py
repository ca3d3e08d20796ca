"""Saving: checkpoints of a run, written by rank zero while training goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.async_save import Background
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.manifest import CheckpointInfo
from ..errors import CheckpointError
from .reporting.failed_writes import FailedWrites
from .resume_config import digest_of, settled
from .run_config import RunConfig
from .run_folder import CHECKPOINTS, SETTINGS

__all__ = ["RUN", "Checkpointer"]

logger = logging.getLogger(__name__)

RUN = "run"
"""Part of a checkpoint: what ``Trainer.state_dict`` said."""


class Checkpointer:
    """Every rank has one; all call the same methods.

    One save is on its way at a time.  What has become of it is told at the next one, or at the end.

    Args:
        folder: of the run; the one of rank zero counts.
        config: of the run.
        unwritten: is told what the disk refuses, if training goes on all the same.
    """

    def __init__(self, folder: Path, config: RunConfig, unwritten: FailedWrites) -> None:
        self._settings = settled(config)
        self._goes_on = config.checkpoint.on_error == "continue"
        self._shelf = CheckpointManager(folder / CHECKPOINTS, config.checkpoint.keep_last)
        self._background = Background()
        self._unwritten = unwritten

    def save(self, state: Any, step: int, phase: str, value: float | None) -> None:
        """Copy a state, and have it written.  Collective.

        Args:
            state: on rank zero; nothing elsewhere.
            step: optimizer steps taken.
            phase: of the engine.
            value: accuracy, by which the best one is kept; None if it has not been measured.

        Raises:
            CheckpointError: on all ranks, if the save before this one could not be written.
        """
        self.finish()
        if dist.get_rank() != 0:
            return
        about = CheckpointInfo(
            step=step,
            world_size=dist.get_world_size(),
            phase=phase,
            config_digest=digest_of(self._settings),
            value=value,
        )
        parts = {RUN: state, SETTINGS: self._settings}
        self._background.save(parts, lambda copies: self._shelf.save(about, copies))

    def finish(self) -> None:
        """Wait until what is on its way is written.  Collective.

        Raises:
            CheckpointError: on all ranks, if it cannot be, and the run is to stop then.
        """
        told: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._background.finish()
            except CheckpointError as error:
                told = [str(error)]
        dist.broadcast_object_list(told, src=0)
        (failure,) = told
        if failure is None:
            return
        if not self._goes_on:
            raise CheckpointError(failure)
        if dist.get_rank() == 0:
            logger.warning("%s; training goes on", failure)
            self._unwritten.note(CHECKPOINTS, failure)
