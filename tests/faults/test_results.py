"""Results that cannot be written once training is done: nothing is trained again for them."""

from __future__ import annotations

import errno
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.faults.courses import ALL_PHASES, differences_of_runs
from tests.faults.driver import ROOT, Act, Driver, Fault, Run

pytestmark = pytest.mark.slow("trains a run, and goes on with it twice")

FINISH = "worm_dist.training.run:_finish"
WRITE = "worm_dist.training.reporting.rank_zero:write_json"
LAST_STEP = 24
RESTARTED = {rank: {"TORCHELASTIC_RESTART_COUNT": "1"} for rank in range(2)}


def _nothing(real: Act, *args: Any) -> None:
    pass


def _put_a_file_there(real: Act, trainer: Any, out: Path, *args: Any) -> Any:
    (out / "ticket").touch()
    return real(trainer, out, *args)


def _fill_the_disk(real: Act, *args: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NO_PICTURES = Fault.do(_nothing, rank=None, step=None).at(
    "worm_dist.training.reporting.tensorboard:TensorBoardLog.figures"
)
NO_TICKET = Fault.do(_put_a_file_there, rank=0, step=1).at(FINISH)
NO_RESULT = Fault.do(_fill_the_disk, rank=0, step=1).at(WRITE)
NO_STEP = Fault.raise_(0, step=1)
"""A step that is trained all the same ends the run."""


@pytest.mark.fault(28, "the same command")
@pytest.mark.fault(28, "a restart by torchrun, with --resume never")
def test_what_could_not_be_written_is_written_by_the_same_command(
    driver: Driver, tmp_path: Path
) -> None:
    """``result.json`` was there without the ticket.  So the run counted as finished: the same
    command put the folder aside, and trained from the first epoch."""
    (tmp_path / "whole").mkdir()
    whole = Driver(tmp_path / "whole")
    assert [end.exitcode for end in whole(2, Run((NO_PICTURES,), ALL_PHASES))] == [0, 0]

    ends = driver(2, Run((NO_PICTURES, NO_TICKET), ALL_PHASES))
    assert [end.exitcode for end in ends] == [3, 3]
    assert "results could not be written" in ends[0].errors[0] and "ticket: " in ends[0].errors[0]
    assert "accuracy" in ends[0].printed, "the figures are at least on the console"
    assert not (driver.out / "result.json").exists()

    (driver.out / "ticket").unlink()
    settings = {**ALL_PHASES, "resume": "never"}
    faults = (NO_PICTURES, NO_STEP, NO_RESULT)
    ends = driver(2, Run(faults, settings, environment=RESTARTED))
    assert [end.exitcode for end in ends] == [3, 3]
    assert "result.json: No space left on device" in ends[0].errors[0]
    assert (driver.out / "ticket" / "ticket.json").exists()

    ends = driver(2, Run((NO_PICTURES, NO_STEP), ALL_PHASES))
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    assert f"* goes on from step {LAST_STEP}" in ends[0].printed
    assert list(differences_of_runs(whole.out, driver.out)) == []
    soak = runpy.run_path(str(ROOT / "launch" / "soak_kills.py"))
    assert soak["_equal"](driver.out, soak["end_of"](whole.out)), "so launch/soak finds, too"
    assert [path.name for path in tmp_path.glob("run*")] == ["run"], "nothing is put aside"
