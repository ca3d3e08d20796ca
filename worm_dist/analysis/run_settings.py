"""The settings of a run, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.durable_io import read_small
from ..errors import CheckpointError
from ..training.reporting.run_description import DESCRIPTION

__all__ = ["read_description", "read_object", "read_settings"]

_MAX_BYTES = 16 << 20


def read_settings(folder: Path) -> Mapping[str, Any] | None:
    """The settings by dotted key; None if the run has not written them.

    Raises:
        CheckpointError: the file is damaged.
    """
    description = read_description(folder)
    return None if description is None else description["settings"]


def read_description(folder: Path) -> Mapping[str, Mapping[str, Any]] | None:
    """Settings, versions and machine; None if the run has not written them.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    content = read_object(path)
    for key in ("settings", "versions", "machine"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"{path}: not the description of a run: it has no {key}")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        CheckpointError: it cannot be read, or has another content.
    """
    try:
        content = json.loads(read_small(path, _MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: not JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object")
    return content
