"""Run: one training from settings to results on disk."""

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
from ..distributed.watchdog import Timeouts, watched
from ..errors import CheckpointError, DivergenceError
from ..verdict import Phase
from .checkpointer import RUN, Checkpointer
from .installation import installation
from .preemption import exit_code_of_stopped, heeding
from .reporting.failed_writes import FailedWrites
from .reporting.rank_zero import RankZeroReport
from .reporting.reporter import Report
from .resume_config import settled
from .run_config import RunConfig
from .run_folder import RESULT, own_folder
from .trainer import Trainer

__all__ = ["run"]

_EACH_HOST_DECIDES = ("data.root", "data.num_workers", "distributed.deepspeed")
"""Where things are; of DeepSpeed's file it is compared what it says."""


def run(config: RunConfig, out: Path, resume: str = "auto") -> int:
    """Train as the settings say and leave the results in a folder.  Every rank calls it.

    Args:
        config: of the run.
        out: the run's folder.
        resume: ``auto``, ``never`` or the path of a checkpoint; see ``own_folder``.

    Returns:
        What the process exits with.

    Raises:
        WormError: whatever ends the run before its time, with the same exit code on every rank.  Of
            several ranks each has told why by then.
    """
    place = RankInfo.from_environment()
    settings = config.distributed
    carrier = "auto" if settings.backend == "deepspeed" else settings.backend
    progress, halt = Progress(), StopCoordinator()
    patience = Timeouts(settings.startup_timeout_seconds, settings.timeout_seconds)
    with (
        heeding() as heed,
        process_group(place, carrier, settings.startup_timeout_seconds) as device,
        watched(place, progress, patience, halt) if place.world_size > 1 else nullcontext(),
    ):
        _require_started_alike(config, device)
        with _own(config, out, resume) as checkpoint:
            return _train(config, out, checkpoint, place, device, progress, halt, heed)


def _own(config: RunConfig, out: Path, resume: str) -> AbstractContextManager[Checkpoint | None]:
    """The run's folder, on rank zero."""
    if dist.get_rank() != 0:
        return nullcontext()
    return own_folder(out, resume, config, dist.get_world_size())


def _train(
    config: RunConfig,
    out: Path,
    checkpoint: Checkpoint | None,
    place: RankInfo,
    device: torch.device,
    progress: Progress,
    halt: StopCoordinator,
    heed: Callable[[StopCoordinator], None],
) -> int:
    state = _told(checkpoint)
    unwritten = FailedWrites()
    report = Report()
    if place.rank == 0:
        written = None if state is None else state["report"]
        report = RankZeroReport(out, config, unwritten, written)
    saving = Checkpointer(out, config, unwritten)
    trainer = Trainer(config, place, device, report, progress, halt, saving)
    if state is not None:
        trainer.load_state_dict(state)
    heed(halt)
    trainer.run()
    if trainer.stopped:
        report.stop(trainer.engine)
        return exit_code_of_stopped(os.environ)
    progress.reach("writing the results")
    _finish(trainer, out, report, unwritten)
    return 0


def _told(checkpoint: Checkpoint | None) -> Any:
    """What every rank goes on from, if rank zero has found something.  Collective."""
    told = [None if checkpoint is None else str(checkpoint.path.resolve())]
    dist.broadcast_object_list(told, src=0)
    return None if told[0] is None else Checkpoint(told[0]).read(RUN)


def _finish(trainer: Trainer, out: Path, report: Report, unwritten: FailedWrites) -> None:
    if dist.get_rank() == 0 and trainer.engine.phase is Phase.TICKET:
        ticket = (out / "ticket", trainer.model_arguments)
        unwritten.spare("ticket", trainer.engine.save_ticket, *ticket)
    report.finish(trainer.engine, trainer.result)
    # Curves and lines that are missing are a pity; without these two there was no run.
    if "ticket" in unwritten or RESULT in unwritten:
        raise CheckpointError(
            f"the run is over, but what it came to is not in {out}: {unwritten}; make room there, "
            "or train again with another --out"
        )


def _require_started_alike(config: RunConfig, device: torch.device) -> None:
    """Ranks with other settings or other code would train, for a while, another network."""
    said = config.flat()
    settings = {key: str(value) for key, value in {**said, **settled(config), **said}.items()}
    for key in _EACH_HOST_DECIDES:
        del settings[key]
    assert dist.group.WORLD is not None
    found = ProcessGroupComm(dist.group.WORLD, device).differences({**settings, **installation()})
    if found:
        raise DivergenceError(
            f"start: the ranks have not been started alike: {'; '.join(found)}; give all of them "
            "the same settings and the same installation"
        )
