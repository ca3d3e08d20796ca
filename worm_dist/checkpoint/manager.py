"""Shelf: the checkpoints of one run, newest and best, side by side in one folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
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
    """Puts checkpoints into a folder, finds them again and removes old ones.

    Only one process may write to it at a time: see ``run_lock``.

    Args:
        folder: of the checkpoints; it is made when the first one is written.
        keep_last: how many of the newest are kept, at least two: the newest may turn out damaged.
            The best is kept besides.

    Raises:
        ConfigError: fewer than two are to be kept.
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

    def save(self, about: CheckpointInfo, states: Mapping[str, Any]) -> Path:
        """Write a checkpoint whose states are all in this process; its folder is returned.

        Args:
            about: what the manifest says.
            states: by the name of their part; see ``Staged.write``.

        Raises:
            CheckpointError: it cannot be written; nothing of it is left.
        """
        staged = self.stage(about.step)
        try:
            files = {
                name: seal
                for part, state in states.items()
                for name, seal in staged.write(part, state).items()
            }
        except BaseException:
            staged.abandon()
            raise
        return self.commit(staged, about, files)

    def stage(self, step: int) -> Staged:
        """A new folder for ranks to write to: ``Staged.write``, then ``commit`` or ``abandon``."""
        return Staged.create(self._folder, step)

    def commit(
        self, staged: Staged, about: CheckpointInfo, files: Mapping[str, FileDigest]
    ) -> Path:
        """Make what was staged the checkpoint of its step, and remove what need not be kept.

        Args:
            staged: of this shelf.
            about: what the manifest says besides the files.
            files: what ``Staged.write`` returned, of all ranks together.

        Raises:
            CheckpointError: a file is not there, or it cannot be written; nothing of it is left.
        """
        try:
            path = staged.commit(about, files)
        except BaseException:
            staged.abandon()
            raise
        self._damaged.discard(path)
        self.retain(about.step)
        return path

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint of which every byte is right; None if there is none.

        Others are passed with a warning that says which and why.
        """
        for _, path in reversed(self._found()):
            try:
                return self.open(path)
            except CheckpointError as error:
                self._damaged.add(path)
                logger.warning("checkpoint %s is passed over: %s", path.name, error)
        return None

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """A checkpoint of which every byte is right.

        Raises:
            CheckpointError: it is not.
        """
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        return checkpoint

    def retain(self, step: int) -> None:
        """Remove all up to a step but the newest ones and the best.

        Those that are known to be damaged count for nothing, and are not removed.  Those after the
        step are left alone.

        Raises:
            CheckpointError: one cannot be removed.
        """
        whole: dict[int, Checkpoint] = {}
        for found, path in self._found():
            if found > step or path in self._damaged:
                continue
            try:
                checkpoint = Checkpoint(path)
            except CheckpointError:
                continue
            if found in whole:
                discard(whole[found].path)  # the earlier of two of one step
            whole[found] = checkpoint
        kept = list(whole)[-self._keep_last :]
        values = [(checkpoint.manifest.value, step) for step, checkpoint in whole.items()]
        measured = [(value, step) for value, step in values if value is not None]
        if measured:
            kept.append(max(measured)[1])
        for found in whole.keys() - kept:
            discard(whole[found].path)

    def rewind(self, step: int) -> None:
        """Remove all after a step: the run goes on from there, and they are of another course.

        Raises:
            CheckpointError: one cannot be removed.
        """
        for found, path in self._found():
            if found > step:
                discard(path)

    def sweep(self) -> None:
        """Remove what was left unfinished.  No other process may be writing."""
        for name in self._names():
            if is_leftover(name):
                remove(self._folder / name)

    def _found(self) -> list[tuple[int, Path]]:
        """All that are called checkpoints, by step; what they are remains to be seen.

        Of two of one step the one that was about to be replaced has a zero in front, and is first.
        """
        named = [(STEP.fullmatch(name), name) for name in self._names()]
        found = [(int(match[1]), name) for match, name in named if match]
        return [(step, self._folder / name) for step, name in sorted(found, key=_age)]

    def _names(self) -> list[str]:
        with reading(self._folder):
            return os.listdir(self._folder) if self._folder.is_dir() else []


def _age(found: tuple[int, str]) -> tuple[int, int]:
    step, name = found
    return step, -len(name)
