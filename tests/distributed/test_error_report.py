"""What torchrun makes of the error of a rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from worm_dist.distributed.error_report import write_torchelastic_error
from worm_dist.errors import CheckpointError


def _as_torchrun_shows_it(error: Exception, file: Path) -> str:
    """Rank one has raised it, and rank zero has ended for that in the same second."""
    try:
        raise error
    except Exception as raised:
        write_torchelastic_error(raised)
    failures = {
        0: ProcessFailure(local_rank=0, pid=os.getpid(), exitcode=1, error_file=""),
        1: ProcessFailure(local_rank=1, pid=os.getpid(), exitcode=1, error_file=str(file)),
    }
    _, _, root_cause = str(ChildFailedError("train", failures)).partition("Root Cause")
    return root_cause


def test_torchrun_shows_the_error_that_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of errors in the same second it takes that of the lowest rank."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    shown = _as_torchrun_shows_it(ValueError("a bug"), file)
    assert "rank      : 1" in shown and "Traceback" in shown and "ValueError: a bug" in shown
    shown = _as_torchrun_shows_it(CheckpointError("file x: damaged"), file)
    assert "traceback : file x: damaged\n" in shown and "Traceback" not in shown


def test_an_error_that_cannot_be_written_down_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks were not told of it, since the file's own error came between."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "error.json"))
    write_torchelastic_error(ValueError("a bug"))
