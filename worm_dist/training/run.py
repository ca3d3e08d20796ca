"""One training run, from settings to results on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import Communicator, ProcessGroupComm
from ..distributed.graceful_stop import StopCoordinator
from ..distributed.init import RankInfo, process_group
from ..distributed.log_lines import rank_named
from ..distributed.progress import Progress
from ..distributed.stacks import STACKS
from ..distributed.timeouts import Timeouts
from ..distributed.watchdog import watched
from ..engine.attachment import context_of
from ..errors import CheckpointError, ConfigError
from ..verdict import Phase
from .checkpointer import RUN, Checkpointer
from .consistency import require_same_start
from .kernels import choose_kernels
from .newest_checkpoint import newest_checkpoint
from .preemption import exit_code_of_stopped, stop_on_signals
from .put_aside import RESULT, TICKET
from .reporting.activity import shown_activity
from .reporting.console import Console
from .reporting.failed_writes import FailedWrites
from .reporting.quiet_console import QuietConsole
from .reporting.rank_zero import RankZeroReport
from .reporting.reporter import Report
from .resume_argument import resume_argument
from .run_config import RunConfig
from .run_folder import RunFolder, open_run_folder
from .run_state import require_valid
from .share_state import share_state
from .trainer import Trainer

__all__ = ["run"]


def run(config: RunConfig, out: Path, resume: str = "auto", quiet: bool = False) -> int:
    """Train by the settings and write the results to a folder.  Every rank calls it.

    Args:
        config: the run's settings.
        out: the run's folder.
        resume: ``auto``, ``never`` or a path, on rank zero's host; see ``resume_argument``.
        quiet: whether the console has the last line and warnings only.

    Returns:
        The exit code of the process.

    Raises:
        WormError: the run failed; the exit code is the same on every rank.  With several ranks, the
            cause has been reported on each of them by then.
    """
    rank_info = RankInfo.from_environment()
    settings = config.distributed
    progress, stop = Progress(), StopCoordinator()
    timeouts = Timeouts(settings.startup_timeout_seconds, settings.timeout_seconds)
    with (
        rank_named(rank_info.rank),
        stop_on_signals() as install_handlers,
        process_group(rank_info, settings.transport, settings.startup_timeout_seconds) as device,
        watched(rank_info, progress, timeouts, stop, out / STACKS)
        if rank_info.world_size > 1
        else nullcontext(),
    ):
        assert dist.group.WORLD is not None
        comm = ProcessGroupComm(dist.group.WORLD, device)
        require_same_start(config, comm)
        choose_kernels(config, device)
        progress.reach("opening the run's folder")
        with _run_folder(config, out, resume, comm) as folder:
            parts = rank_info, device, progress, stop, install_handlers
            return _train(config, out, folder, *parts, quiet)


@contextmanager
def _run_folder(
    config: RunConfig, out: Path, resume: str, comm: Communicator
) -> Iterator[RunFolder | None]:
    """Lock the run's folder on rank zero; None on other ranks.  Its entry is collective.

    Raises:
        ConfigError, CheckpointError: see ``open_run_folder``; raised on every rank.
    """
    with ExitStack() as stack:
        folder = None
        with refused_on_every_rank(comm, ConfigError):
            if comm.rank == 0:  # only its host needs to have what --resume names
                opened = open_run_folder(out, resume_argument(resume), config, comm.size)
                folder = stack.enter_context(opened)
        yield folder


def _train(
    config: RunConfig,
    out: Path,
    folder: RunFolder | None,
    rank_info: RankInfo,
    device: torch.device,
    progress: Progress,
    stop: StopCoordinator,
    install_handlers: Callable[[StopCoordinator], None],
    quiet: bool = False,
) -> int:
    progress.reach("the state of the checkpoint")
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, device)
    state = _saved_state(config, out, folder, rank_info, device, comm)
    failed_writes = FailedWrites()
    report = Report()
    lease = None if folder is None else folder.lease
    with refused_on_every_rank(comm):
        if lease is not None:
            saved_report = None if state is None else state["report"]
            console = QuietConsole() if quiet else Console()
            report = RankZeroReport(out, config, console, failed_writes, lease, saved_report)
        checkpointer = Checkpointer(out, config, failed_writes, lease)
    shows = rank_info.rank == 0 and not quiet
    with shown_activity(in_logs=False) if shows else nullcontext():
        trainer = Trainer(config, rank_info, device, report, progress, stop, checkpointer)
    if state is not None:
        trainer.load_state_dict(state)
    del state  # it would take the memory of another network during the run
    install_handlers(stop)
    trainer.run()
    if trainer.stopped:
        report.stop(trainer.engine)
        return exit_code_of_stopped(os.environ)
    progress.reach("writing the results")
    if lease is not None:
        lease.require()
    _finish(trainer, out, report, failed_writes)
    return 0


def _saved_state(
    config: RunConfig,
    out: Path,
    folder: RunFolder | None,
    rank_info: RankInfo,
    device: torch.device,
    comm: Communicator,
) -> dict[str, Any] | None:
    """The trainer's state in the newest checkpoint; None for a new run.  Collective.

    Raises:
        CheckpointError: the checkpoint is damaged or does not hold the state of a run; raised on
            every rank.
    """
    source, checkpoint = newest_checkpoint(out, folder, config, rank_info, device)
    state = None
    with refused_on_every_rank(comm):
        if checkpoint is not None:
            state = checkpoint.read(RUN)
            require_valid(state, checkpoint.path)
    return share_state(state, device, source, None if checkpoint is None else checkpoint.path)


def _finish(trainer: Trainer, out: Path, report: Report, failed_writes: FailedWrites) -> None:
    is_sharded = context_of(trainer.engine).backend.shards_weights  # then all ranks save together
    if (is_sharded or dist.get_rank() == 0) and trainer.engine.phase is Phase.TICKET:
        ticket = (out / TICKET, trainer.model_arguments)
        failed_writes.best_effort(TICKET, trainer.engine.save_ticket, *ticket)
    report.finish(trainer.engine, trainer.result)
    # Missing curves or log lines are tolerable; without these two files the run was in vain.
    if TICKET in failed_writes or RESULT in failed_writes:
        raise CheckpointError(
            f"the run has finished, but its results could not be written to {out}: "
            f"{failed_writes}; make room there, and start it again: it goes on from its last "
            "checkpoint and writes them"
        )
