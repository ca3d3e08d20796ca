"""Scripts: calls those in launch/ as a person would, from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "CONFIG",
    "ROOT",
    "SHORT",
    "call",
    "environment_with",
    "needs_venv",
    "result_of",
    "trained",
]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "digits.yaml"
SHORT = ("--epochs=1", "--search.every=11ba", "--search.elbow.latest=null")
"""Two masks."""

needs_venv = pytest.mark.skipif(
    Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(),
    reason="the scripts use .venv; run the tests with it",
)


def environment_with(**more: str) -> dict[str, str]:
    """Ours, without what pytest has put there; deepspeed need not look for GPUs."""
    inherited = {key: os.environ[key] for key in os.environ if not key.startswith("PYTEST")}
    return {**inherited, "DS_ACCELERATOR": "cpu", **more}


def call(script: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return _call_from(Path("/"), script, *words, **environment)


def _call_from(
    folder: Path, script: str, *words: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / script), *map(str, words)],
        cwd=folder,
        env=environment_with(**environment),
        capture_output=True,
        text=True,
    )


def trained(folder: Path, script: str, **environment: str) -> Mapping[str, Any]:
    """The result of a short run on two ranks, whose paths are relative to the folder above it."""
    shutil.copy(CONFIG, folder.parent / "mine.yaml")
    paths = ("mine.yaml", "--out", folder.name)
    done = _call_from(folder.parent, script, *paths, *SHORT, **environment)
    assert done.returncode == 0, done.stderr
    return result_of(folder)


def result_of(folder: Path) -> Mapping[str, Any]:
    result: Mapping[str, Any] = json.loads((folder / "result.json").read_text())
    assert (result["world_size"], result["checks"]) == (2, 2)
    return result
