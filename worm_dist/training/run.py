"""One training run, from settings to results on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint.checkpoint import Checkpoint
from ..distributed.collectives import ProcessGroupComm
from ..distributed.graceful_stop import StopCoordinator
from ..distributed.init import RankInfo, process_group
from ..distributed.progress import Progress
from ..distributed.stacks import STACKS
from ..distributed.timeouts import Timeouts
from ..distributed.watchdog import watched
from ..errors import CheckpointError
from ..verdict import Phase
from .checkpointer import RUN, Checkpointer
from .consistency import require_same_start
from .preemption import exit_code_of_stopped, stop_on_signals
from .reporting.failed_writes import FailedWrites
from .reporting.rank_zero import RankZeroReport
from .reporting.reporter import Report
from .run_config import RunConfig
from .run_folder import RESULT, open_run_folder
from .trainer import Trainer

__all__ = ["run"]


def run(config: RunConfig, out: Path, resume: str = "auto") -> int:
    """Train by the settings and write the results to a folder.  Every rank calls it.

    Args:
        config: the run's settings.
        out: the run's folder.
        resume: ``auto``, ``never`` or the path of a checkpoint; see ``open_run_folder``.

    Returns:
        The exit code of the process.

    Raises:
        WormError: the run failed; the exit code is the same on every rank.  With several ranks, the
            cause has been reported on each of them by then.
    """
    rank_info = RankInfo.from_environment()
    settings = config.distributed
    transport = "auto" if settings.backend == "deepspeed" else settings.backend
    progress, stop = Progress(), StopCoordinator()
    timeouts = Timeouts(settings.startup_timeout_seconds, settings.timeout_seconds)
    with (
        stop_on_signals() as install_handlers,
        process_group(rank_info, transport, settings.startup_timeout_seconds) as device,
        watched(rank_info, progress, timeouts, stop, out / STACKS)
        if rank_info.world_size > 1
        else nullcontext(),
    ):
        assert dist.group.WORLD is not None
        require_same_start(config, ProcessGroupComm(dist.group.WORLD, device))
        with _run_folder(config, out, resume) as checkpoint:
            return _train(
                config, out, checkpoint, rank_info, device, progress, stop, install_handlers
            )


def _run_folder(
    config: RunConfig, out: Path, resume: str
) -> AbstractContextManager[Checkpoint | None]:
    """Open the run's folder on rank zero; a null context on other ranks."""
    if dist.get_rank() != 0:
        return nullcontext()
    return open_run_folder(out, resume, config, dist.get_world_size())


def _train(
    config: RunConfig,
    out: Path,
    checkpoint: Checkpoint | None,
    rank_info: RankInfo,
    device: torch.device,
    progress: Progress,
    stop: StopCoordinator,
    install_handlers: Callable[[StopCoordinator], None],
) -> int:
    state = _broadcast_state(checkpoint)
    failed_writes = FailedWrites()
    report = Report()
    if rank_info.rank == 0:
        saved_report = None if state is None else state["report"]
        report = RankZeroReport(out, config, failed_writes, saved_report)
    checkpointer = Checkpointer(out, config, failed_writes)
    trainer = Trainer(config, rank_info, device, report, progress, stop, checkpointer)
    if state is not None:
        trainer.load_state_dict(state)
    install_handlers(stop)
    trainer.run()
    if trainer.stopped:
        report.stop(trainer.engine)
        return exit_code_of_stopped(os.environ)
    progress.reach("writing the results")
    _finish(trainer, out, report, failed_writes)
    return 0


def _broadcast_state(checkpoint: Checkpoint | None) -> Any:
    """Broadcast the path of rank zero's checkpoint; return the state in it.  Collective.

    Args:
        checkpoint: the checkpoint to resume from on rank zero; None for a new run and on other
            ranks.

    Returns:
        The trainer's state dict; None for a new run.
    """
    paths = [None if checkpoint is None else str(checkpoint.path.resolve())]
    dist.broadcast_object_list(paths, src=0)
    (path,) = paths
    return None if path is None else Checkpoint(path).read(RUN)


def _finish(trainer: Trainer, out: Path, report: Report, failed_writes: FailedWrites) -> None:
    if dist.get_rank() == 0 and trainer.engine.phase is Phase.TICKET:
        ticket = (out / "ticket", trainer.model_arguments)
        failed_writes.best_effort("ticket", trainer.engine.save_ticket, *ticket)
    report.finish(trainer.engine, trainer.result)
    # Missing curves or log lines are tolerable; without these two files the run was in vain.
    if "ticket" in failed_writes or RESULT in failed_writes:
        raise CheckpointError(
            f"the run has finished, but its results could not be written to {out}: "
            f"{failed_writes}; make room there, or train again with another --out"
        )
