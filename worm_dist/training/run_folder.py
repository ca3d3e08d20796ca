"""Run folder: a run has it to itself, and goes on from the checkpoint that is in it."""

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
from .resume_config import changes, digest_of, settled
from .run_config import RunConfig

__all__ = ["CHECKPOINTS", "JOURNAL", "RESULT", "SETTINGS", "own_folder"]

logger = logging.getLogger(__name__)

CHECKPOINTS, JOURNAL, RESULT = "checkpoints", "journal.jsonl", "result.json"
SETTINGS = "settings"
"""Part of a checkpoint: what ``settled`` said of its run."""

_COUNTS_OF_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@contextmanager
def own_folder(
    out: Path,
    resume: str,
    config: RunConfig,
    world_size: int,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Checkpoint | None]:
    """A folder that no other run writes to; yields what to go on from.  Only rank zero has one.

    Args:
        out: the folder.  What is in it is put aside under another name, unless the run goes on
            there.
        resume: ``auto`` goes on with an unfinished run of the same settings that is in the folder,
            ``never`` begins anew, and anything else is the path of the checkpoint to go on from.
            A launcher that starts the ranks again means the run that it has begun: then a
            checkpoint in the folder comes first.
        config: of the run.
        world_size: of the run.
        environment: in which launchers say that they have started a run again.

    Raises:
        ConfigError: another run writes there, or the folder cannot be made; the checkpoint is of
            other settings.
        CheckpointError: the checkpoint that was named is damaged, or this many ranks cannot go on
            from the one that was chosen; names the numbers that can.
    """
    with ExitStack() as lock:
        try:
            if out.exists():
                lock.enter_context(run_lock(out))  # whoever still writes there keeps it
            auto = _unfinished(out, config) if _may_look(resume, environment) else None
            chosen = auto or _named(resume, config)
            if chosen is not None:
                _require_possible(config, world_size, chosen)
            if chosen is None or not _is_in(out, chosen):
                lock.close()
                _make_anew(out, chosen)
                lock.enter_context(run_lock(out))
            elif auto is None:
                _go_back(out, chosen.step)
        except OSError as error:
            raise ConfigError(
                f"--out: cannot make {out}: {error.strerror}; name another"
            ) from error
        yield chosen


def _may_look(resume: str, environment: Mapping[str, str]) -> bool:
    again = any(environment.get(name, "0") != "0" for name in _COUNTS_OF_RESTARTS)
    return resume == "auto" or again


def _unfinished(out: Path, config: RunConfig) -> Checkpoint | None:
    """The newest checkpoint of a run of these settings that has not come to its end."""
    shelf = CheckpointManager(out / CHECKPOINTS)
    shelf.sweep()
    if (out / RESULT).exists():
        return None
    newest = shelf.newest()
    if newest is not None and newest.manifest.config_digest != digest_of(settled(config)):
        found = changes(newest.read(SETTINGS), settled(config))
        words = "%s holds an unfinished run of other settings (%s), which is put aside"
        logger.warning(words, out, "; ".join(found))
        return None
    return newest


def _named(resume: str, config: RunConfig) -> Checkpoint | None:
    """The checkpoint that ``--resume`` names, if it names one."""
    if resume in ("auto", "never"):
        return None
    chosen = CheckpointManager.open(resume)
    found = changes(chosen.read(SETTINGS), settled(config))
    if found:
        raise ConfigError(
            f"--resume {resume}: the settings are other ones ({'; '.join(found)}); go on with the "
            "saved ones, or start anew with --resume never"
        )
    return chosen


def _require_possible(config: RunConfig, world_size: int, chosen: Checkpoint) -> None:
    began = chosen.manifest.world_size
    if began == world_size:
        return
    if config.truncation.compression == "powersgd":
        raise CheckpointError(
            f"--resume: {chosen.path} is of {began} ranks, and these are {world_size}; what "
            f"PowerSGD leaves out is kept on each rank, so start {began}"
        )
    batch = config.data.batch_size
    passes = settled(config).get("distributed.deepspeed.gradient_accumulation_steps", 1)
    possible = [size for size in range(1, batch + 1) if batch % (size * passes) == 0]
    if world_size not in possible:
        each = f" in {passes} passes each" if passes > 1 else ""
        raise CheckpointError(
            f"--resume: {chosen.path} is of {began} ranks and batches of {batch}, which "
            f"{world_size} ranks cannot share{each}; start one of {', '.join(map(str, possible))}"
        )


def _is_in(out: Path, chosen: Checkpoint) -> bool:
    return chosen.path.resolve().parent == (out / CHECKPOINTS).resolve()


def _go_back(out: Path, step: int) -> None:
    """What came after that step was another course, which is given up."""
    CheckpointManager(out / CHECKPOINTS).rewind(step)
    with suppress(FileNotFoundError):
        (out / RESULT).unlink()


def _make_anew(out: Path, chosen: Checkpoint | None) -> None:
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
