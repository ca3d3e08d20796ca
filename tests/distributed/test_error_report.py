"""What torchrun makes of the error of a rank, and how its process ends."""

from __future__ import annotations

import os
import subprocess
import sys
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


_PROGRAM = """
import atexit, time
from worm_dist.distributed import error_report

error_report._SECONDS_FOR_EXIT_HANDLERS = 0.3

def handler():
    time.sleep({seconds})
    print("handled")

atexit.register(handler)
print("printed", end="")
error_report.hard_exit({exit_code})
"""


@pytest.mark.parametrize(
    ("exit_code", "seconds", "printed"), [(6, 60, "printed"), (0, 1, "printedhandled\n")]
)
def test_an_exit_handler_holds_no_process_that_has_failed(
    exit_code: int, seconds: int, printed: str
) -> None:
    """One slept for 25 seconds, and so long the launcher did not learn that the rank had failed."""
    program = _PROGRAM.format(exit_code=exit_code, seconds=seconds)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (exit_code, printed), ended.stderr
