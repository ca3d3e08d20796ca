"""Folder: a checkpoint while it is written, and how it takes its place all at once.

    step-7.tmp-<uuid>/     files are written here, by one rank or by many, and synced
    manifest.json          written last, by one rank; then the folder is synced
    step-7/                renamed; then the folder above is synced

Killed at any point, there is the checkpoint before, or this one.
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
from .state_file import Packed, pack, write_part

__all__ = ["STEP", "Staged", "discard", "is_leftover"]

STEP = re.compile(r"step-([0-9]+)")
_LEFTOVER = re.compile(r"step-[0-9]+\.tmp-.*", re.DOTALL)


class Staged:
    """The folder of a checkpoint that is not there yet.

    Rank zero makes it with ``create`` and commits it; other ranks are told its path, and write
    parts of their own.  Nothing here talks to other processes.

    Args:
        path: of the staged folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, folder: Path, step: int) -> Staged:
        """A new folder for the checkpoint of a step.

        Raises:
            CheckpointError: it cannot be made.
        """
        path = _aside(folder / f"step-{step}")
        with writing(path):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            path.mkdir()
        return cls(path)

    def write(self, part: str, state: Any) -> dict[str, FileDigest]:
        """Write a state, durably, under a name that no other rank uses.

        Args:
            part: letters, digits, ``_`` and ``-``.
            state: see ``pack``; or what ``pack`` returned.

        Returns:
            What ``commit`` wants to know, from all ranks that write.

        Raises:
            CheckpointError: the disk is full or cannot be written, or the state cannot be saved.
        """
        return write_part(self.path, part, state if isinstance(state, Packed) else pack(state))

    def commit(self, about: CheckpointInfo, files: Mapping[str, FileDigest]) -> Path:
        """Make it the checkpoint of its step, in place of an earlier one of the same step.

        Args:
            about: what the manifest says besides the files.
            files: what ``write`` returned, of all ranks together.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: a file is not there, or it cannot be written.
        """
        self._check(files)
        write_manifest(self.path, about, files)
        sync_folder(self.path)
        final = self.path.with_name(f"step-{about.step}")
        with writing(final):
            earlier = _put_back(final) if os.path.lexists(final) else None
            os.replace(self.path, final)
        sync_folder(final.parent)
        if earlier is not None:
            discard(earlier)
        return final

    def abandon(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _check(self, files: Mapping[str, FileDigest]) -> None:
        with reading(self.path):
            found = set(os.listdir(self.path))
        if found != files.keys():
            raise CheckpointError(
                f"{self.path}: wanted the files {sorted(files)}, found {sorted(found)}; do all "
                "ranks write to one disk?"
            )
        for name, seal in files.items():
            check_size(self.path / name, file_size(self.path / name), seal)


def discard(path: Path) -> None:
    """Remove a checkpoint, or whatever has its name: first the name, then the content.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    aside = _aside(path)
    with writing(path):
        os.replace(path, aside)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def is_leftover(name: str) -> bool:
    """Whether it is the name of something unfinished."""
    return _LEFTOVER.fullmatch(name) is not None


def _put_back(final: Path) -> Path:
    """Make room for a checkpoint of the same step; returns where the earlier one is now.

    A folder cannot take the place of one that is not empty.  With one more zero in its name the
    earlier one is found until the new one is there.
    """
    earlier = final.with_name(final.name.replace("-", "-0"))
    if os.path.lexists(earlier):
        discard(earlier)
    os.replace(final, earlier)
    return earlier


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
