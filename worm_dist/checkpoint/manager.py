"""The checkpoints of one run in one folder: saving, finding, and removing old ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .checkpoint import Checkpoint
from .durable_io import FileDigest, reading
from .manifest import CheckpointInfo
from .staging import STEP, Staged, discard, is_leftover, remove

__all__ = ["CheckpointManager"]

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves checkpoints to a folder, finds them again and removes old ones.

    Only one process may write to the folder at a time: see ``run_lock``.

    Args:
        folder: folder of the checkpoints; created when the first one is written.
        keep_last: number of newest checkpoints to keep, at least 2, since the newest may turn out
            to be damaged.  The best one is kept in addition.

    Raises:
        ConfigError: ``keep_last`` is less than 2.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2) -> None:
        if keep_last < 2:
            raise ConfigError(
                f"keep_last = {keep_last}: keep at least 2 checkpoints; the newest may turn out "
                "damaged"
            )
        self._folder = Path(folder)
        self._keep_last = keep_last
        self._damaged: set[Path] = set()

    def save(self, info: CheckpointInfo, states: Mapping[str, Any]) -> Path:
        """Write a checkpoint whose states are all in this process.

        Args:
            info: description of the checkpoint.
            states: the state of each part, by name; see ``Staged.write``.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the checkpoint cannot be written; nothing of it is left on disk.
        """
        staged = self.stage(info.step)
        try:
            files = {
                name: digest
                for part, state in states.items()
                for name, digest in staged.write(part, state).items()
            }
        except BaseException:
            staged.abandon()
            raise
        return self.commit(staged, info, files)

    def stage(self, step: int) -> Staged:
        """Create a temporary folder for several ranks to write to.

        Each rank calls ``Staged.write``; then one calls ``commit``, or ``Staged.abandon``.

        Args:
            step: number of optimizer steps taken.
        """
        return Staged.create(self._folder, step)

    def commit(self, staged: Staged, info: CheckpointInfo, files: Mapping[str, FileDigest]) -> Path:
        """Turn a staged folder into the checkpoint of its step, and remove old checkpoints.

        Args:
            staged: a folder from ``stage``.
            info: description of the checkpoint.
            files: the return values of ``Staged.write`` on all ranks, merged.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: a file is missing, or the checkpoint cannot be written; nothing of it
                is left on disk.
        """
        try:
            path = staged.commit(info, files)
        except BaseException:
            staged.abandon()
            raise
        self._damaged.discard(path)
        self.retain(info.step)
        return path

    def newest(
        self, *, but_shards: bool = False, damaged: Collection[Path] = ()
    ) -> Checkpoint | None:
        """The newest valid checkpoint; None if there is none.

        Damaged ones are skipped with a warning that names the checkpoint and the reason.

        Args:
            but_shards: whether shards are verified elsewhere.
            damaged: folders of checkpoints that were found damaged there.
        """
        self._damaged.update(damaged)
        for _, path in reversed(self._found()):
            if path in damaged:
                continue
            try:
                checkpoint = Checkpoint(path)
                shards = checkpoint.shards if but_shards else ()
                checkpoint.verify(checkpoint.manifest.files.keys() - shards)
                return checkpoint
            except CheckpointError as error:
                self._damaged.add(path)
                logger.warning("checkpoint %s is skipped: %s", path.name, error)
        return None

    @property
    def damaged(self) -> list[str]:
        """Names of the checkpoints that ``newest`` has found damaged, by step."""
        return [path.name for _, path in self._found() if path in self._damaged]

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Open a checkpoint and verify all of its files.

        Args:
            path: the checkpoint's folder.

        Raises:
            CheckpointError: it is missing, damaged or incomplete.
        """
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        return checkpoint

    def retain(self, step: int) -> None:
        """Remove all checkpoints up to a step except the newest ones and the best one.

        Checkpoints that are known to be damaged are neither counted nor removed.  Those after the
        step are left unchanged.

        Args:
            step: number of optimizer steps.

        Raises:
            CheckpointError: a checkpoint cannot be removed.
        """
        complete: dict[int, Checkpoint] = {}
        for found, path in self._found():
            if found > step or path in self._damaged:
                continue
            try:
                checkpoint = Checkpoint(path)
            except CheckpointError:
                continue
            if found in complete:
                discard(complete[found].path)  # the earlier of two checkpoints of one step
            complete[found] = checkpoint
        kept = list(complete)[-self._keep_last :]
        values = [(checkpoint.manifest.value, step) for step, checkpoint in complete.items()]
        measured = [(value, step) for value, step in values if value is not None]
        if measured:
            kept.append(max(measured)[1])
        for found in complete.keys() - kept:
            discard(complete[found].path)

    def rewind(self, step: int) -> None:
        """Remove all checkpoints after a step, from which the run is about to resume.

        Args:
            step: number of optimizer steps.

        Raises:
            CheckpointError: a checkpoint cannot be removed.
        """
        for found, path in self._found():
            if found > step:
                discard(path)

    def sweep(self) -> None:
        """Remove unfinished checkpoints; no other process may be writing to the folder."""
        for name in self._names():
            if is_leftover(name):
                remove(self._folder / name)

    def _found(self) -> list[tuple[int, Path]]:
        """Step and path of every entry with the name of a checkpoint, by step; not validated.

        Of two entries of one step the one that was about to be replaced, whose number has a leading
        zero, comes first.
        """
        matches = [(STEP.fullmatch(name), name) for name in self._names()]
        found = [(int(match[1]), name) for match, name in matches if match]
        return [(step, self._folder / name) for step, name in sorted(found, key=_age)]

    def _names(self) -> list[str]:
        with reading(self._folder):
            return os.listdir(self._folder) if self._folder.is_dir() else []


def _age(found: tuple[int, str]) -> tuple[int, int]:
    step, name = found
    return step, -len(name)
