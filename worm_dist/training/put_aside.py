"""The content of a run's folder: whether it is a run, and how it is put aside for the next one.

The folder itself stays where it is: it may be a mount point or a link, and its lock is in it.
"""

from __future__ import annotations

import errno
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ..checkpoint.durable_io import read_small
from ..checkpoint.lock import is_lock
from ..checkpoint.staging import STEP
from ..errors import CheckpointError, ConfigError

__all__ = ["CHECKPOINTS", "JOURNAL", "RESULT", "TICKET", "entries", "put_aside", "require_usable"]

CHECKPOINTS, JOURNAL, RESULT, TICKET = "checkpoints", "journal.jsonl", "result.json", "ticket"

_EARLIER = "earlier."
"""Beginning of the names of runs that are put aside within a folder."""
_ELSEWHERE = (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
_MAX_BYTES = 1 << 20


def entries(folder: Path) -> list[Path]:
    """What is in a folder, without locks, earlier runs and what a file system puts there."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not is_lock(path.name) and not path.name.startswith(_EARLIER)
        if path.name != "lost+found"
    ]


def require_usable(out: Path) -> None:
    """Check that a run may write to a folder; it need not exist.

    Raises:
        ConfigError: it holds something else than a run, or is within the folder of a run.
        OSError: it cannot be read.
    """
    if out.exists() and entries(out) and not _is_run(out):
        raise ConfigError(
            f"--out: {out} is not empty and holds no run; name a folder for this run alone, such "
            f"as {out / 'run'}"
        )
    for parent in Path(os.path.realpath(out)).parents:  # links in a circle are no error in it
        if _is_run(parent):
            raise ConfigError(
                f"--out: {out} is in the folder of another run, {parent}; name a folder outside"
            )


def put_aside(out: Path) -> Path:
    """Move what is in a run's folder out of the way; its lock stays.

    Args:
        out: the run's folder, which is locked and not empty.

    Returns:
        The new folder of the earlier run: beside the folder if it can be renamed there, else in it.

    Raises:
        OSError: the content cannot be moved.
    """
    real = out.resolve()
    changed_at = max(path.lstat().st_mtime for path in entries(real))
    changed = time.strftime("%Y%m%d-%H%M%S", time.localtime(changed_at))
    beside = _unused(real.with_name(f"{real.name}.{changed}"))
    try:
        return _moved(real, beside)
    except OSError as error:
        if error.errno not in _ELSEWHERE:
            raise
    return _moved(real, _unused(real / f"{_EARLIER}{changed}"))


def _moved(folder: Path, target: Path) -> Path:
    target.mkdir()
    try:
        # Checkpoints first: without them the rest of a move that is broken off is not resumed.
        for path in sorted(entries(folder), key=lambda path: path.name != CHECKPOINTS):
            path.rename(target / path.name)
    except OSError:
        with suppress(OSError):  # not empty: some of it has been moved
            target.rmdir()
        raise
    return target


def _unused(path: Path) -> Path:
    number = 1
    while os.path.lexists(path):
        number += 1
        path = path.with_name(f"{path.name.split('+')[0]}+{number}")
    return path


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a run: a result, a journal or a checkpoint.  Other programs use such
    names too, so their content counts."""
    return _is_result(folder / RESULT) or _is_journal(folder / JOURNAL) or _has_checkpoint(folder)


def _is_result(path: Path) -> bool:
    with suppress(CheckpointError, ValueError, RecursionError):
        result = json.loads(read_small(path, _MAX_BYTES))
        return isinstance(result, dict) and {"preset", "mask_digest"} <= result.keys()
    return False


def _is_journal(path: Path) -> bool:
    """Whether a file is a journal; that of a run without a check is empty."""
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        line = file.readline(_MAX_BYTES)
        entry = json.loads(line) if line else {"event": None, "step": None}
        return isinstance(entry, dict) and {"event", "step"} <= entry.keys()
    return False


def _has_checkpoint(folder: Path) -> bool:
    with suppress(OSError):
        return any(
            STEP.fullmatch(path.name) and (path / "manifest.json").exists()
            for path in (folder / CHECKPOINTS).iterdir()
        )
    return False
