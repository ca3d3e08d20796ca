"""Locks of a run's directory, as others see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worm_dist.checkpoint.lock import run_lock
from worm_dist.errors import ConfigError

__all__ = ["pid_in", "refused"]


def refused(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=text), run_lock(folder):
        pass


def pid_in(folder: Path) -> int:
    return int(json.loads((folder / "run.lock").read_text())["pid"])
