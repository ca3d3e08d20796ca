"""Rank reports: each rank tells the one that commits a checkpoint what it has written, by a file.

Checkpoints are written in the background, where ranks must not communicate by collectives: these
would mix with those of the training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from ..errors import CheckpointError
from ..schema import Schema
from .durable_io import FileDigest, read_small, reading, write_json, writing

__all__ = ["collect", "report"]

_POLL_SECONDS = 0.02
_MAX_BYTES = 1 << 20


class _Report(Schema):
    files: dict[str, FileDigest]
    failure: str | None


def report(folder: Path, rank: int, files: Mapping[str, FileDigest], failure: str | None) -> None:
    """Tell what this rank has written to a staged checkpoint.

    Args:
        folder: the staged checkpoint.
        rank: this rank.
        files: size and hash of each file, by name.
        failure: why it could not write; None if it has written.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    path = _path(folder, rank)
    content = _Report(files=dict(files), failure=failure)
    with writing(path):
        write_json(path, content.model_dump())


def collect(folder: Path, ranks: Sequence[int], seconds: float) -> dict[str, FileDigest]:
    """Wait until all of these ranks have reported, and remove their reports.

    Args:
        folder: the staged checkpoint.
        ranks: the ranks.
        seconds: longest time to wait.

    Returns:
        Size and hash of each file that they have written, by name.

    Raises:
        CheckpointError: a rank could not write, or has not reported in time.
    """
    deadline = time.monotonic() + seconds
    for rank in ranks:
        path = _path(folder, rank)
        while not _is_there(path):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder}: rank {rank} has not written its part within {seconds:g} seconds"
                )
            time.sleep(_POLL_SECONDS)
    files: dict[str, FileDigest] = {}
    for rank in ranks:
        path = _path(folder, rank)
        try:
            found = _Report.model_validate_json(read_small(path, _MAX_BYTES))
        except ValidationError as error:
            raise CheckpointError(f"{path}: not the report of a rank") from error
        if found.failure is not None:
            raise CheckpointError(f"rank {rank}: {found.failure}")
        files |= found.files
        with writing(path):
            os.unlink(path)
    return files


def _is_there(path: Path) -> bool:
    with reading(path):  # a network file system may fail, and training is to go on without a save
        return path.exists()


def _path(folder: Path, rank: int) -> Path:
    return folder / f".rank-{rank}.json"
