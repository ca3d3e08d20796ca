"""JSON lines: rows of a benchmark in a file, each a dataclass of JSON values on its own line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["append", "read"]

R = TypeVar("R", bound="DataclassInstance")


def append(path: Path, row: DataclassInstance) -> None:
    """Append a row to a file and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        cut_short = file.tell() and _last_byte(path) != b"\n"
        line = json.dumps(asdict(row)) + "\n"
        file.write((b"\n" if cut_short else b"") + line.encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def read(path: Path, kind: Callable[..., R]) -> list[R]:
    """Read the rows of a file, if it exists, oldest first.

    Raises:
        CheckpointError: another version has written the file.
    """
    if not path.exists():
        return []
    try:
        return [kind(**json.loads(line)) for line in path.read_text().splitlines()]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"bench: {path} was not written by this version ({error}); remove it, or choose "
            "another --out"
        ) from error
