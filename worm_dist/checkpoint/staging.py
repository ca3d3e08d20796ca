"""Staging: a checkpoint is written to a temporary folder and renamed once it is complete.

    step-7.tmp-<uuid>/     files are written here, by one rank or by several, and synced
    manifest.json          written last, by one rank; then the folder is synced
    step-7/                renamed; then the parent folder is synced

If the process is killed at any point, either the previous checkpoint or this one is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .durable_io import FileDigest, check_size, file_size, reading, sync_folder, writing
from .manifest import CheckpointInfo, write_manifest
from .state_file import Packed, pack, write_part, write_shards

__all__ = ["STEP", "Staged", "discard", "is_leftover"]

STEP = re.compile(r"step-([0-9]+)")
_LEFTOVER = re.compile(r"step-[0-9]+\.tmp-.*", re.DOTALL)


class Staged:
    """A checkpoint that is being written to a temporary folder.

    Rank zero creates it with ``create`` and commits it; other ranks construct it with the same path
    and write parts of their own.  Nothing here communicates with other processes.

    Args:
        path: the temporary folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, folder: Path, step: int) -> Staged:
        """Create a temporary folder for the checkpoint of a step.

        Args:
            folder: folder of the run's checkpoints; created if it is missing.
            step: number of optimizer steps taken.

        Raises:
            CheckpointError: the folder cannot be created.
        """
        path = _temporary_path(folder / f"step-{step}")
        with writing(path):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            path.mkdir()
        return cls(path)

    def write(self, part: str, state: Any) -> dict[str, FileDigest]:
        """Write a state and sync it to disk.

        Args:
            part: name of the state, of letters, digits, ``_`` and ``-``; not used by another rank.
            state: a state as described in ``pack``, or the return value of ``pack``.

        Returns:
            Size and hash of each file written, by name, for ``commit``.

        Raises:
            CheckpointError: the disk is full or cannot be written, or the state cannot be saved.
        """
        return write_part(self.path, part, state if isinstance(state, Packed) else pack(state))

    def write_shards(self, part: str, rank: int, packed: Packed) -> dict[str, FileDigest]:
        """Write a rank's parts of a state's sharded tensors and sync them.

        Args:
            part: name of the state, which one rank writes.
            rank: this rank.
            packed: its state, with sharded tensors.

        Returns:
            Size and hash of the file written, by name, for ``commit``.

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        return write_shards(self.path, part, rank, packed)

    def commit(self, info: CheckpointInfo, files: Mapping[str, FileDigest]) -> Path:
        """Rename the folder to the checkpoint of its step; replaces an earlier one of that step.

        Args:
            info: description of the checkpoint.
            files: the return values of ``write`` on all ranks, merged.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: a file is missing, or the checkpoint cannot be written.
        """
        self._check(files)
        write_manifest(self.path, info, files)
        sync_folder(self.path)
        final = self.path.with_name(f"step-{info.step}")
        with writing(final):
            earlier = _move_earlier(final) if os.path.lexists(final) else None
            os.replace(self.path, final)
        sync_folder(final.parent)
        if earlier is not None:
            discard(earlier)
        return final

    def abandon(self) -> None:
        """Remove the temporary folder with its content."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _check(self, files: Mapping[str, FileDigest]) -> None:
        with reading(self.path):
            found = set(os.listdir(self.path))
        if found != files.keys():
            raise CheckpointError(
                f"{self.path}: wanted the files {sorted(files)}, found {sorted(found)}; do all "
                "ranks write to the same disk?"
            )
        for name, digest in files.items():
            check_size(self.path / name, file_size(self.path / name), digest)


def discard(path: Path) -> None:
    """Remove a checkpoint, or whatever has its name: rename it, then remove its content.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    temporary = _temporary_path(path)
    with writing(path):
        os.replace(path, temporary)
    remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def is_leftover(name: str) -> bool:
    """Whether a name is that of an unfinished checkpoint's folder."""
    return _LEFTOVER.fullmatch(name) is not None


def _move_earlier(final: Path) -> Path:
    """Rename an earlier checkpoint of the same step, and return its new path.

    A folder cannot be renamed to one that is not empty.  With a leading zero in its number the
    earlier checkpoint is still found until the new one is in place.
    """
    earlier = final.with_name(final.name.replace("-", "-0"))
    if os.path.lexists(earlier):
        discard(earlier)
    os.replace(final, earlier)
    return earlier


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
