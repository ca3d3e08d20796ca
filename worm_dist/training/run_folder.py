"""The run's folder: locks it for one run and chooses the checkpoint to resume from."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lock import run_lock
from ..checkpoint.manager import CheckpointManager
from ..errors import CheckpointError, ConfigError
from .resume_config import changes, fixed_settings
from .run_config import RunConfig

__all__ = ["CHECKPOINTS", "JOURNAL", "RESULT", "SETTINGS", "open_run_folder"]

logger = logging.getLogger(__name__)

CHECKPOINTS, JOURNAL, RESULT = "checkpoints", "journal.jsonl", "result.json"
SETTINGS = "settings"
"""Name of the checkpoint part that holds the run's ``fixed_settings``."""

_RESTART_COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@contextmanager
def open_run_folder(
    out: Path,
    resume: str,
    config: RunConfig,
    world_size: int,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Checkpoint | None]:
    """Lock the run's folder; yield the checkpoint to resume from, if any.  Rank zero only.

    Args:
        out: the run's folder.  An earlier run in it is moved aside under another name, unless it
            is resumed there.
        resume: ``auto`` resumes an unfinished run of the same settings in the folder, ``never``
            starts a new run, and anything else is the path of a checkpoint.  After a restart by
            the launcher, a checkpoint in the folder takes precedence over all of these.
        config: the run's settings.
        world_size: number of ranks.
        environment: environment variables, which hold the launcher's restart counter.

    Raises:
        ConfigError: another run uses the folder, the folder cannot be created, or the config
            differs from the checkpoint.
        CheckpointError: the named checkpoint is damaged, or this number of ranks cannot resume
            from it; names the numbers that can.
    """
    with ExitStack() as lock:
        try:
            if out.exists():
                lock.enter_context(run_lock(out))  # fails if another run is still writing
            auto = _unfinished(out, config) if _may_resume_here(resume, environment) else None
            chosen = auto or _named(resume, config)
            if chosen is not None:
                _require_world_size(config, world_size, chosen)
            if chosen is None or not _is_in(out, chosen):
                lock.close()
                _create(out, chosen)
                lock.enter_context(run_lock(out))
            elif auto is None:
                _rewind(out, chosen.step)
        except OSError as error:
            raise ConfigError(
                f"--out: cannot create {out}: {error.strerror}; name another folder"
            ) from error
        yield chosen


def _may_resume_here(resume: str, environment: Mapping[str, str]) -> bool:
    is_restart = any(environment.get(name, "0") != "0" for name in _RESTART_COUNTERS)
    return resume == "auto" or is_restart


def _unfinished(out: Path, config: RunConfig) -> Checkpoint | None:
    """The newest checkpoint of an unfinished run with these settings."""
    manager = CheckpointManager(out / CHECKPOINTS)
    manager.sweep()
    if (out / RESULT).exists():
        return None
    newest = manager.newest()
    found = [] if newest is None else changes(newest.read(SETTINGS), fixed_settings(config))
    if found:
        message = "%s holds an unfinished run with another config (%s); it is moved aside"
        logger.warning(message, out, "; ".join(found))
        return None
    return newest


def _named(resume: str, config: RunConfig) -> Checkpoint | None:
    """The checkpoint that ``--resume`` names, if it names one."""
    if resume in ("auto", "never"):
        return None
    chosen = CheckpointManager.open(resume)
    found = changes(chosen.read(SETTINGS), fixed_settings(config))
    if found:
        raise ConfigError(
            f"--resume {resume}: the config differs from the checkpoint ({'; '.join(found)}); use "
            "the saved values, or start a new run with --resume never"
        )
    return chosen


def _require_world_size(config: RunConfig, world_size: int, chosen: Checkpoint) -> None:
    """Raise if the run cannot be resumed on this number of ranks."""
    saved = chosen.manifest.world_size
    if saved == world_size:
        return
    if config.truncation.compression == "powersgd":
        raise CheckpointError(
            f"--resume: {chosen.path} was saved by {saved} ranks, and this run has {world_size}; "
            f"PowerSGD's error feedback is kept per rank, so start {saved} ranks"
        )
    batch = config.data.batch_size
    passes = fixed_settings(config).get("distributed.deepspeed.gradient_accumulation_steps", 1)
    possible = [size for size in range(1, batch + 1) if batch % (size * passes) == 0]
    if world_size not in possible:
        each = f" in {passes} passes each" if passes > 1 else ""
        raise CheckpointError(
            f"--resume: {chosen.path} was saved by {saved} ranks with batches of {batch}, which "
            f"{world_size} ranks cannot share{each}; start {', '.join(map(str, possible))} ranks"
        )


def _is_in(out: Path, chosen: Checkpoint) -> bool:
    return chosen.path.resolve().parent == (out / CHECKPOINTS).resolve()


def _rewind(out: Path, step: int) -> None:
    """Delete the checkpoints after a step, and the result."""
    CheckpointManager(out / CHECKPOINTS).rewind(step)
    with suppress(FileNotFoundError):
        (out / RESULT).unlink()


def _create(out: Path, chosen: Checkpoint | None) -> None:
    """Create an empty folder; move an existing one aside.

    Args:
        out: the run's folder.
        chosen: the checkpoint to resume from, whose journal is copied; None for a new run.
    """
    if out.exists():
        changed = time.strftime("%Y%m%d-%H%M%S", time.localtime(out.stat().st_mtime))
        out.rename(_unused(out.with_name(f"{out.name}.{changed}")))
    out.mkdir(parents=True)
    if chosen is not None:
        with suppress(FileNotFoundError):
            shutil.copy(chosen.path.parent.parent / JOURNAL, out)


def _unused(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('+')[0]}+{number}")
    return path
