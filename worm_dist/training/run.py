"""Run: one training from settings to results on disk."""

from __future__ import annotations

import time
from pathlib import Path

from ..cluster.launch import Place, process_group
from ..verdict import Phase
from .rank_zero_report import RankZeroReport
from .report import Report
from .run_config import RunConfig
from .trainer import Trainer

__all__ = ["run"]


def run(config: RunConfig, out: Path) -> None:
    """Train as the settings say and leave the results in a folder.  Every rank calls it.

    Args:
        config: of the run.
        out: the run's folder.  One that is there already is put aside under another name.
    """
    place = Place.from_environment()
    settings = config.distributed
    carrier = "auto" if settings.backend == "deepspeed" else settings.backend
    with process_group(place, carrier, settings.timeout_seconds) as device:
        if place.rank == 0:
            _put_aside(out)
            out.mkdir(parents=True)
        report = RankZeroReport(out, config) if place.rank == 0 else Report()
        trainer = Trainer(config, place, device, report)
        result = trainer.run()
        if place.rank == 0 and trainer.engine.phase is Phase.TICKET:
            trainer.engine.save_ticket(out / "ticket", trainer.model_arguments)
        report.finish(trainer.engine, result)


def _put_aside(out: Path) -> None:
    if out.exists():
        changed = time.strftime("%Y%m%d-%H%M%S", time.localtime(out.stat().st_mtime))
        out.rename(_unused(out.with_name(f"{out.name}.{changed}")))


def _unused(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('+')[0]}+{number}")
    return path
