"""What cannot be written down is missed, but the training is not thrown away."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import Act, Driver, Fault, Run

SEARCHING = {"preset": "worm", "search.every": "4ba", "search.elbow.latest": "null"}


def _delete_the_folder(real: Act, trainer: Any, *batch: Any) -> Any:
    shutil.rmtree(trainer._report._folder)
    return real(trainer, *batch)


def _put_a_file_there(real: Act, trainer: Any, *batch: Any) -> Any:
    folder: Path = trainer._report._folder
    shutil.rmtree(folder)
    folder.touch()
    return real(trainer, *batch)


def _fill_the_disk_of_the_log(real: Act, *batch: Any) -> Any:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return real(*batch)


@pytest.mark.fault(24, "the run's folder is deleted in the middle of it")
def test_a_folder_that_is_lost_costs_curves_and_lines_only(driver: Driver) -> None:
    """A journal that could not be written ended the run with a traceback."""
    run = Run((Fault.do(_delete_the_folder, rank=0, step=6),), SEARCHING)
    ends = driver(2, run)
    assert [end.exitcode for end in ends] == [0, 0]
    assert ends[0].said.count("journal.jsonl cannot be written (No such file") == 1
    assert ends[0].said.count("TensorBoard's file") == 1
    result = json.loads((driver.out / "result.json").read_text())
    assert sorted(result["failed_writes"]) == ["TensorBoard", "journal.jsonl"]
    assert (result["status"], result["checks"]) == ("not_found", 4)


@pytest.mark.fault(24, "no place for the results either")
def test_results_that_are_lost_are_told_with_an_exit_code(driver: Driver) -> None:
    settings = {**SEARCHING, "checkpoint.on_error": "continue"}
    run = Run((Fault.do(_put_a_file_there, rank=0, step=6),), settings)
    ends = driver(2, run)
    assert [end.exitcode for end in ends] == [3, 3]
    (line,) = ends[0].errors
    assert f"its results could not be written to {driver.out}" in line
    assert "result.json: " in line and "journal.jsonl: " in line
    assert "accuracy" in ends[0].printed, "the figures are at least on the console"


@pytest.mark.fault(24, "the disk of the job's log is full")
def test_a_log_that_is_full_does_not_end_the_run(driver: Driver) -> None:
    run = Run((Fault.do(_fill_the_disk_of_the_log, rank=0, step=6),))
    ends = driver(2, run)
    assert [end.exitcode for end in ends] == [0, 0]
    assert ends[0].said.count("console cannot be written (No space left on device)") == 1
    assert json.loads((driver.out / "result.json").read_text())["failed_writes"] == ["console"]


@pytest.mark.fault(24, "a folder that cannot be made")
def test_a_folder_that_cannot_be_made_is_told_at_the_start(driver: Driver) -> None:
    driver.out.parent.joinpath("file").touch()
    driver.out = driver.out.parent / "file" / "run"
    ends = driver(2, Run())
    assert [end.exitcode for end in ends] == [2, 2]
    assert f"--out: cannot create {driver.out}: Not a directory" in ends[0].said
