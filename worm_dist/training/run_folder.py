"""The run's folder: locks it for one run and chooses the checkpoint to resume from."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lease import Lease
from ..checkpoint.lock import run_lock
from ..checkpoint.manager import CheckpointManager
from ..errors import CheckpointError, ConfigError
from .put_aside import CHECKPOINTS, JOURNAL, RESULT, entries, put_aside, require_usable
from .resume_config import changes, fixed_settings
from .run_config import RunConfig

__all__ = [
    "CHECKPOINTS",
    "JOURNAL",
    "RESULT",
    "SETTINGS",
    "RunFolder",
    "open_run_folder",
    "require_world_size",
    "unfinished",
]

logger = logging.getLogger(__name__)

SETTINGS = "settings"
"""Name of the checkpoint part that holds the run's ``fixed_settings``."""

_RESTART_COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class RunFolder:
    """The locked folder of a run, on rank zero.

    Attributes:
        checkpoint: the checkpoint to resume from; None for a new run.
        is_verified: whether its shards have been verified too.
        lease: the folder's lock; its ``require`` raises if another run has taken it over.
        may_resume: whether an unfinished run may be resumed without being named: the settings
            allow it, and no finished run was in the folder.
        resume: see ``open_run_folder``.
    """

    checkpoint: Checkpoint | None
    is_verified: bool
    lease: Lease
    may_resume: bool
    resume: str

    def older(self, out: Path, config: RunConfig, damaged: Collection[Path]) -> RunFolder:
        """The same with an older checkpoint; if there is none and ``resume`` is ``never``, as for
        a new run: what is in the folder is moved to another one.

        Args:
            out: the run's folder.
            config: the run's settings.
            damaged: folders of checkpoints whose shards are damaged.

        Raises:
            CheckpointError: all checkpoints are damaged, and ``resume`` is not ``never``.
            OSError: the content cannot be moved.
        """
        checkpoint, why = _unfinished(out, config, self.resume, damaged)
        if checkpoint is None:
            _make_room(out, why)
            _begin(out, None)
        return replace(self, checkpoint=checkpoint)


@contextmanager
def open_run_folder(
    out: Path,
    resume: str,
    config: RunConfig,
    world_size: int,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[RunFolder]:
    """Lock the run's folder and choose the checkpoint to resume from.  Rank zero only.

    Args:
        out: the run's folder; created if it is missing.  The content of an earlier run in it is
            moved to another folder, unless it is resumed there.
        resume: ``auto`` resumes an unfinished run of the same settings in the folder, ``never``
            starts a new run, and anything else is the path of a checkpoint.  After a restart by
            the launcher, a checkpoint in the folder takes precedence over all of these.
        config: the run's settings.
        world_size: number of ranks.
        environment: environment variables, which hold the launcher's restart counter and the job.

    Raises:
        ConfigError: another run uses the folder or one above it, it holds something else than a
            run, it cannot be created, or the config differs from the checkpoint.
        CheckpointError: the named checkpoint or all checkpoints of the folder are damaged, or this
            number of ranks cannot resume from it; names the numbers that can.
    """
    with ExitStack() as stack:
        try:
            require_usable(out)
            if not out.exists():
                stack.callback(_remove_if_empty, out)
            out.mkdir(parents=True, exist_ok=True)
            # Locked from here to the end: a second start would else put aside what is begun here.
            lease = stack.enter_context(run_lock(out, environment))
            may_resume = _may_resume_here(resume, environment) and not (out / RESULT).exists()
            chosen = _prepare(out, resume, config, world_size, environment)
        except OSError as error:
            raise ConfigError(
                f"--out: cannot create {out}: {error.strerror}; name another folder"
            ) from error
        yield RunFolder(*chosen, lease, may_resume, resume)


def _remove_if_empty(out: Path) -> None:
    with suppress(OSError):
        out.rmdir()


def _prepare(
    out: Path,
    resume: str,
    config: RunConfig,
    world_size: int,
    environment: Mapping[str, str],
) -> tuple[Checkpoint | None, bool]:
    """Choose the checkpoint, and leave nothing in the folder but the run that it belongs to.

    Returns:
        The checkpoint, and whether its shards have been verified too.
    """
    auto, why = None, f"--resume {resume}"
    if _may_resume_here(resume, environment):
        auto, why = _unfinished(out, config, resume)
    chosen = auto or _named(resume, config)
    if chosen is not None:
        require_world_size(config, world_size, chosen)
    if chosen is None or not _is_in(out, chosen):
        _make_room(out, why)
        _begin(out, chosen)
    elif auto is None:
        _rewind(out, chosen.step)
    return chosen, auto is None


def _may_resume_here(resume: str, environment: Mapping[str, str]) -> bool:
    is_restart = any(environment.get(name, "0") != "0" for name in _RESTART_COUNTERS)
    return resume == "auto" or is_restart


def unfinished(out: Path, config: RunConfig, damaged: Collection[Path]) -> Checkpoint | None:
    """The newest checkpoint of an unfinished run with these settings, in a folder that this process
    does not write to, its shards not verified; None if there is none, or if all are damaged."""
    if (out / RESULT).exists():
        return None
    newest = CheckpointManager(out / CHECKPOINTS).newest(but_shards=True, damaged=damaged)
    if newest is None or changes(newest.read(SETTINGS), fixed_settings(config)):
        return None
    return newest


def _unfinished(
    out: Path, config: RunConfig, resume: str, damaged: Collection[Path] = ()
) -> tuple[Checkpoint | None, str]:
    """The newest checkpoint of an unfinished run with these settings, or why there is none.  Its
    shards are not verified; ``damaged`` are folders of those whose shards are damaged.

    Raises:
        CheckpointError: all checkpoints are damaged, and ``resume`` is not ``never``.
    """
    manager = CheckpointManager(out / CHECKPOINTS)
    manager.sweep()
    if (out / RESULT).exists():
        return None, "it has finished"
    newest = manager.newest(but_shards=True, damaged=damaged)
    if newest is None:
        if manager.damaged and resume != "never":
            raise CheckpointError(
                f"{out / CHECKPOINTS}: all checkpoints are damaged: {', '.join(manager.damaged)}; "
                "restore one of them, or start anew with --resume never"
            )
        return None, "damaged checkpoints" if manager.damaged else "it has no checkpoint"
    found = changes(newest.read(SETTINGS), fixed_settings(config))
    return (None, f"another config: {'; '.join(found)}") if found else (newest, "")


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


def require_world_size(config: RunConfig, world_size: int, chosen: Checkpoint) -> None:
    """Check that the run can be resumed on this number of ranks.

    Raises:
        CheckpointError: it cannot; names the numbers that can.
    """
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


def _make_room(out: Path, why: str) -> None:
    """Move what is in a folder to another one, and say why it is not gone on with."""
    if entries(out):
        moved = put_aside(out)
        logger.warning("%s: the earlier run there (%s) is moved to %s", out, why, moved)


def _begin(out: Path, chosen: Checkpoint | None) -> None:
    """Put the journal into an empty folder, which marks it as that of a run.

    Args:
        out: the run's folder.
        chosen: the checkpoint to resume from, whose journal is copied; None for a new run.
    """
    if chosen is not None:
        with suppress(FileNotFoundError):
            shutil.copy(chosen.path.parent.parent / JOURNAL, out)
    (out / JOURNAL).touch()
