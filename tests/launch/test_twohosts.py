"""Training across two hosts.  Where there cannot be two, that is said."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.scripts import (
    CONFIG,
    ROOT,
    SHORT,
    call,
    environment_with,
    needs_venv,
    result_of,
    trained,
)
from tests.launch.test_netlab import REFUSED, _can_run

pytestmark = [
    pytest.mark.slow("starts launchers and whole runs on two hosts"),
    needs_venv,
]


def _worker(mark: str) -> int | None:
    """The process of rank one, on the second host."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if {f"MARK={mark}", "TORCHELASTIC_RUN_ID=twohosts", "RANK=1"} <= set(variables):
            return int(folder.name)
    return None


def test_a_run_goes_on_to_its_end_after_a_rank_was_killed(tmp_path: Path, expected: str) -> None:
    """For now it begins anew, on both hosts, and comes to what it would have come to anyway."""
    if not _can_run():
        assert call("twohosts", CONFIG).returncode == REFUSED
        return
    said = tmp_path / "said"
    with said.open("w") as written:
        process = subprocess.Popen(
            [ROOT / "launch" / "twohosts", CONFIG, *SHORT, "--out", tmp_path / "run"],
            env=environment_with(MAX_RESTARTS="1", MARK=str(tmp_path)),
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        while "over gloo" not in said.read_text():
            assert process.poll() is None, said.read_text()
            time.sleep(0.1)
        worker = _worker(str(tmp_path))
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        assert process.wait(timeout=120) == 0, said.read_text()
    finally:
        process.terminate()
        process.wait()
    assert said.read_text().count("world size 2 over gloo") >= 2
    assert len(list(tmp_path.glob("run*"))) == 2  # the first one was put aside
    assert result_of(tmp_path / "run")["mask_digest"] == expected


def test_deepspeed_trains_across_two_hosts(tmp_path: Path, expected: str) -> None:
    if not _can_run():
        assert call("twohosts", CONFIG, LAUNCHER="deepspeed").returncode == REFUSED
        return
    result = trained(tmp_path / "run", "twohosts", LAUNCHER="deepspeed")
    assert result["mask_digest"] == expected


def test_an_unknown_launcher_is_one_clear_line() -> None:
    done = call("twohosts", CONFIG, LAUNCHER="ssh")
    assert done.returncode == 2
    assert done.stderr == "twohosts: LAUNCHER 'ssh': expected torchrun or deepspeed\n"
