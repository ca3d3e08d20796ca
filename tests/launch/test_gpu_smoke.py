"""launch/gpu-smoke: its rehearsal tries the same on CPUs, and its report says what came of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, environment_with, needs_venv

pytestmark = [
    pytest.mark.slow("trains the demo twice, half a minute on two idle cores"),
    needs_venv,
    pytest.mark.timeout(660),
]


def _smoke(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / "gpu-smoke"), *map(str, words)],
        cwd="/",
        env=environment_with(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_rehearsal_goes_through_its_sections(tmp_path: Path) -> None:
    sections = ("resume", "checks")  # the former trains the demo too; ZeRO has tests of its own
    done = _smoke("--cpu", "--out", tmp_path, *sections)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr
    assert "this is a rehearsal over gloo, on two ranks" in done.stdout
    for section in sections:
        assert f"## {section}: ok, " in report
    assert "equal to the bit" in report and "are not equal" not in report
    assert "packed hook and masked DDP: largest relative difference of a gradient 0.0e+00" in report
    for step in ("DDP", "worm 100 %", "worm 50 %", "worm 50 % faded"):
        assert f"| {step} | " in report


def test_a_section_that_fails_is_in_the_report_and_in_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("in the place of the run's folder")
    done = _smoke("--cpu", "--out", tmp_path, "demo")
    assert done.returncode == 1
    report = (tmp_path / "report.md").read_text()
    assert "## demo: FAILED, " in report and "demo" in report.split("```")[1]
    assert _smoke("mend").returncode == 2
