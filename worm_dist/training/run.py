"""Run: one training from settings to results on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from ..checkpoint.lock import run_lock
from ..cluster.agree import Together
from ..cluster.launch import Place, process_group
from ..cluster.progress import Progress
from ..cluster.watch import Patience, watched
from ..errors import CheckpointError, ConfigError, DivergenceError
from ..verdict import Phase
from .installation import installation
from .rank_zero_report import RankZeroReport
from .report import Report
from .run_config import RunConfig
from .trainer import Trainer
from .unwritten import Unwritten

__all__ = ["run"]

_EACH_HOST_DECIDES = ("data.root", "data.num_workers")


def run(config: RunConfig, out: Path) -> None:
    """Train as the settings say and leave the results in a folder.  Every rank calls it.

    Args:
        config: of the run.
        out: the run's folder.  One that is there already is put aside under another name.

    Raises:
        WormError: whatever ends the run before its time, with the same exit code on every rank.  Of
            several ranks each has told why by then.
    """
    place = Place.from_environment()
    settings = config.distributed
    carrier = "auto" if settings.backend == "deepspeed" else settings.backend
    progress = Progress()
    patience = Patience(settings.startup_timeout_seconds, settings.timeout_seconds)
    with (
        process_group(place, carrier, settings.startup_timeout_seconds) as device,
        watched(place, progress, patience) if place.world_size > 1 else nullcontext(),
    ):
        _require_started_alike(config, device)
        with _own_folder(out) if place.rank == 0 else nullcontext():
            _train(config, out, place, device, progress)


def _train(
    config: RunConfig, out: Path, place: Place, device: torch.device, progress: Progress
) -> None:
    unwritten = Unwritten()
    report = RankZeroReport(out, config, unwritten) if place.rank == 0 else Report()
    trainer = Trainer(config, place, device, report, progress)
    result = trainer.run()
    progress.reach("writing the results")
    if place.rank == 0 and trainer.engine.phase is Phase.TICKET:
        ticket = (out / "ticket", trainer.model_arguments)
        unwritten.spare("ticket", trainer.engine.save_ticket, *ticket)
    report.finish(trainer.engine, result)
    # Curves and lines that are missing are a pity; without these two there was no run.
    if "ticket" in unwritten or "result.json" in unwritten:
        raise CheckpointError(
            f"the run is over, but what it came to is not in {out}: {unwritten}; make room there, "
            "or train again with another --out"
        )


def _require_started_alike(config: RunConfig, device: torch.device) -> None:
    """Ranks with other settings or other code would train, for a while, another network."""
    settings = {key: str(value) for key, value in config.flat().items()}
    for key in _EACH_HOST_DECIDES:
        del settings[key]
    assert dist.group.WORLD is not None
    found = Together(dist.group.WORLD, device).differences({**settings, **installation()})
    if found:
        raise DivergenceError(
            f"start: the ranks have not been started alike: {'; '.join(found)}; give all of them "
            "the same settings and the same installation"
        )


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """A new folder that no other run writes to; only rank zero has one."""
    try:
        if out.exists():
            with run_lock(out):
                pass  # a run that still writes there keeps its folder
            _put_aside(out)
        out.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make {out}: {error.strerror}; name another") from error
    with run_lock(out):
        yield


def _put_aside(out: Path) -> None:
    changed = time.strftime("%Y%m%d-%H%M%S", time.localtime(out.stat().st_mtime))
    out.rename(_unused(out.with_name(f"{out.name}.{changed}")))


def _unused(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('+')[0]}+{number}")
    return path
