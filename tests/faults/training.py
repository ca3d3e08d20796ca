"""Training: whole runs in the processes of the ``ranks`` fixture, without a command line."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.faults.driver import CONFIG, SMALL, small_data
from worm_dist.distributed.collectives import ProcessGroupComm
from worm_dist.distributed.graceful_stop import StopCoordinator
from worm_dist.distributed.init import RankInfo
from worm_dist.distributed.progress import Progress
from worm_dist.training import build, run
from worm_dist.training.config_file import read_run_config
from worm_dist.training.reporting.tensorboard import TensorBoardLog

__all__ = ["train"]


def _nobody(halt: StopCoordinator) -> None:
    pass


def train(
    out: Path,
    resume: str = "auto",
    heed: Callable[[StopCoordinator], None] = _nobody,
    **settings: Any,
) -> int:
    """What the command line does, in a process group that is there already; no pictures.

    Args:
        out: the run's folder.
        resume: as on the command line.
        heed: is given what can be asked to stop.
        settings: dotted keys, beside those that make it small.
    """
    multiprocessing.set_start_method("fork", force=True)  # else each loader imports torch again
    vars(build)["load_data"] = lambda _: small_data(dist.get_rank())
    TensorBoardLog.figures = lambda *_: None  # type: ignore[method-assign]
    pairs = {**SMALL, **settings}
    config = read_run_config(CONFIG, [(key, str(value)) for key, value in pairs.items()])
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    device = torch.device("cpu")
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, device)
    with (
        run._run_folder(config, out, resume, comm) as checkpoint,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = run._train(
            config, out, checkpoint, place, device, Progress(), StopCoordinator(), heed
        )
    dist.barrier()
    return code
