"""Asynchronous checkpoints of a run, written in the background.

Rank zero writes what all ranks share.  Sharded state is written by all ranks, if all of them see
the run's folder on a shared disk; else it has been gathered, and rank zero writes everything.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.async_save import AsyncSaver
from ..checkpoint.lease import Lease
from ..checkpoint.lock import is_held
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.manifest import CheckpointInfo
from ..checkpoint.rank_reports import collect, report
from ..checkpoint.sharded_tensor import has_shards, only_shards
from ..checkpoint.staging import Staged
from ..checkpoint.state_file import Packed
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
        folder: the run's folder.
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
        # Before the watchdog ends a run in which rank zero waits, so that the silent rank is named.
        self._timeout = config.distributed.timeout_seconds / 2
        self._folder = folder
        self._manager = CheckpointManager(folder / CHECKPOINTS, config.checkpoint.keep_last)
        self._background = AsyncSaver()
        self._failed_writes = failed_writes
        self._lease = lease
        self._failure: CheckpointError | None = None

    @cached_property
    def is_on_shared_disk(self) -> bool:
        """Whether every rank sees rank zero's folder, by the lock in it.  Collective when it is
        first read."""
        tokens = [None if self._lease is None else self._lease.token]
        dist.broadcast_object_list(tokens, src=0)
        (token,) = tokens
        found: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(found, token is not None and is_held(self._folder, token))
        return all(found)

    def save(self, state: Any, step: int, phase: str, value: float | None) -> None:
        """Copy a state and start writing it in the background.  Collective.

        Args:
            state: the run's state on rank zero; on other ranks only ``LocalShards`` in it are used.
            step: optimizer steps taken.
            phase: the engine's phase.
            value: accuracy, 0 to 1, by which the best checkpoint is kept; None if not measured.

        Raises:
            CheckpointError: the previous save failed; raised on all ranks.
            ConfigError: another run has taken the folder over; raised on rank zero.
        """
        self.finish()
        if self._lease is not None:
            self._lease.require()
        info = CheckpointInfo(
            step=step,
            world_size=dist.get_world_size(),
            phase=phase,
            value=value,
        )
        parts = {RUN: state, SETTINGS: self._settings}
        if self.is_on_shared_disk and has_shards(state):
            self._save_shards(info, parts)
        elif dist.get_rank() == 0:
            self._background.save(parts, lambda copies: self._manager.save(info, copies))

    def _save_shards(self, info: CheckpointInfo, parts: Mapping[str, Any]) -> None:
        """Let every rank write its shards, and rank zero the rest.  Collective."""
        rank, size = dist.get_rank(), dist.get_world_size()
        names: list[str | None] = [None]
        failure: CheckpointError | None = None
        if rank == 0:
            try:
                names = [self._manager.stage(info.step).path.name]
            except CheckpointError as error:  # the other ranks must not wait for this one
                failure = error
        dist.broadcast_object_list(names, src=0)
        (name,) = names
        if name is None:
            self._failure = failure
            return
        staged = Staged(self._folder / CHECKPOINTS / name)

        def write_part(copies: Mapping[str, Packed]) -> None:
            try:
                files = staged.write_shards(RUN, rank, copies[RUN])
            except BaseException as error:
                report(staged.path, rank, {}, str(error) or type(error).__name__)
                raise
            report(staged.path, rank, files, None)

        def write_and_commit(copies: Mapping[str, Packed]) -> None:
            others = range(1, size)
            try:
                files = staged.write_shards(RUN, rank, copies[RUN])
                for part, copy in copies.items():
                    files |= staged.write(part, copy)
            except BaseException:
                with suppress(CheckpointError):  # until then they write to the folder
                    collect(staged.path, others, self._timeout)
                staged.abandon()
                raise
            try:
                files |= collect(staged.path, others, self._timeout)
            except BaseException:
                staged.abandon()
                raise
            self._manager.commit(staged, info, files)

        if rank == 0:
            self._background.save(parts, write_and_commit)
        else:
            self._background.save({RUN: only_shards(parts[RUN])}, write_part)

    def finish(self) -> None:
        """Wait until the save in flight is written.  Collective.

        Raises:
            CheckpointError: the save failed and ``checkpoint.on_error`` is ``stop``; raised on all
                ranks.
        """
        failures: list[str | None] = [None]
        failed, self._failure = self._failure, None
        try:
            self._background.finish()
            if failed is not None:
                raise failed
        except CheckpointError as error:  # another rank's is in its report to rank zero
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
