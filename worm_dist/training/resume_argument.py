"""The value of ``--resume``, in the forms in which people write it."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.staging import STEP
from ..errors import CheckpointError
from .run_folder import CHECKPOINTS

__all__ = ["resume_argument"]

_WORDS = ("auto", "never")
_MANIFEST = "manifest.json"


def resume_argument(text: str) -> str:
    """``auto``, ``never``, or the path of a checkpoint.

    Args:
        text: one of these words in any case, or the path of a checkpoint, of a file in it, of a
            run's folder, or of its folder of checkpoints; the latter two mean the newest one.

    Returns:
        The word, or the checkpoint's path.  A path that does not exist is returned as it is: after
        a restart by the launcher it is not needed any more.

    Raises:
        CheckpointError: there is no checkpoint in the folder.
    """
    path = Path(text)
    if text.lower() in _WORDS and not path.exists():
        return text.lower()
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        return text
    if not (path / _MANIFEST).exists():
        newest = _newest(path / CHECKPOINTS) or _newest(path)
        if newest is None and STEP.fullmatch(path.name):
            return str(path)  # it will be said which file it lacks
        if newest is None:
            raise CheckpointError(
                f"--resume {text}: no checkpoint is there; name a run's folder, or one of its "
                f"checkpoints, such as runs/digits/{CHECKPOINTS}/step-88"
            )
        path = newest
    return str(path)


def _newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step; not validated, as it is named by the user."""
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := STEP.fullmatch(path.name))
    }
    return found[max(found)] if found else None
