"""launch/gpu-smoke: its rehearsal tries the same on CPUs, and its report says what came of it."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import CONFIG, ROOT, environment_with, needs_venv
from tests.programs import Ended, call, variables_of_ranks

pytestmark = [
    pytest.mark.slow("trains the demo twice, twenty seconds on two idle cores"),
    needs_venv,
]


def _rehearse(folder: Path, *words: object) -> Ended:
    """The program, without the script that installs what it needs."""
    program = [ROOT / "launch" / "gpu_smoke.py", "--cpu", "--out", folder / "report", *words]
    (ended,) = call(program, folder)
    return ended


def _train_the_demo(folder: Path) -> None:
    """The section of that name, in processes that need not import torch again."""
    settings = runpy.run_path(str(ROOT / "launch" / "gpu_smoke.py"))
    small = (*settings["SMALL"], *settings["EVERY_EPOCH"])
    words = ["-m", "worm_dist", "train", CONFIG, "--out", folder / "report" / "demo", *small]
    for ended in call(words, folder, variables_of_ranks(2)):
        assert ended.exitcode == 0, ended.err


def test_the_rehearsal_goes_through_its_sections(tmp_path: Path) -> None:
    _train_the_demo(tmp_path)
    sections = ("resume", "checks")  # ZeRO has tests of its own
    done = subprocess.run(
        [ROOT / "launch" / "gpu-smoke", "--cpu", "--out", tmp_path / "report", *sections],
        cwd="/",
        env=environment_with(),
        capture_output=True,
        text=True,
    )
    report = (tmp_path / "report" / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr
    assert "this is a rehearsal over gloo, on two ranks" in done.stdout
    for section in sections:
        assert f"## {section}: ok, " in report
    assert "equal to the bit" in report and "are not equal" not in report
    assert "packed hook and masked DDP: largest relative difference of a gradient 0.0e+00" in report
    for step in ("DDP", "worm 100 %", "worm 50 %", "worm 50 % faded"):
        assert f"| {step} | " in report


def test_a_section_that_fails_is_in_the_report_and_in_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "demo").write_text("in the place of the run's folder")
    done = _rehearse(tmp_path, "demo")
    assert done.exitcode == 1, done.err
    report = (tmp_path / "report" / "report.md").read_text()
    assert "## demo: FAILED, " in report and "demo" in report.split("```")[1]
    assert _rehearse(tmp_path, "mend").exitcode == 2
