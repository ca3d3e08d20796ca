"""Every launcher starts the same training: real launchers, through the scripts in launch/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.scripts import CONFIG, ROOT, call, needs_venv, trained
from worm_dist.__main__ import main

OPEN_MPI = shutil.which("mpirun.openmpi")

pytestmark = [
    pytest.mark.slow("starts launchers and whole runs"),
    needs_venv,
]

SRUN = """#!/usr/bin/env bash
# Two tasks on this host, with what srun tells them.
while [[ $1 == --* ]]; do echo "$1" >>"$SEEN"; shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=0
export SLURM_STEP_NODELIST=localhost
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


def _slurm(folder: Path) -> dict[str, str]:
    """sbatch's environment, and an srun on the PATH."""
    folder.mkdir()
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SEEN": str(folder / "seen"),
        "SLURM_SUBMIT_DIR": str(folder.parent),
        "WORM_DIST": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "1",
    }


def test_torchrun_starts_the_same_training(tmp_path: Path, expected: str) -> None:
    assert trained(tmp_path / "run", "torchrun")["mask_digest"] == expected


@pytest.mark.fault(42, "torchrun, deepspeed and mpirun")
def test_deepspeed_starts_the_same_training(tmp_path: Path, expected: str) -> None:
    """As all of these, with paths that are relative to the caller's folder; they were relative to
    the repository."""
    assert trained(tmp_path / "run", "deepspeed")["mask_digest"] == expected


@pytest.mark.fault(42, "torchrun, deepspeed and mpirun")
def test_mpirun_starts_the_same_training(tmp_path: Path, expected: str) -> None:
    """Rank one, which has nothing to write, ends first.  The mpirun of MPICH then killed rank zero
    before it had written result.json, and ended with 0: rank one had begun MPI, and had left
    without the C library's exit handlers."""
    assert trained(tmp_path / "run", "mpirun")["mask_digest"] == expected


@pytest.mark.skipif(not OPEN_MPI, reason="the machine has no Open MPI")
def test_the_mpirun_of_open_mpi_does_too(tmp_path: Path, expected: str) -> None:
    result = trained(
        tmp_path / "run",
        "mpirun",
        MPIRUN=f"{OPEN_MPI} --allow-run-as-root --oversubscribe",
        MPI4PY_LIBMPI="libmpi.so.40",
    )
    assert result["mask_digest"] == expected


@pytest.mark.fault(42, "a job of slurm, submitted from elsewhere")
def test_a_job_of_slurm_is_the_same_training(tmp_path: Path, expected: str) -> None:
    result = trained(tmp_path / "run", "slurm.sbatch", **_slurm(tmp_path / "slurm"))
    assert result["mask_digest"] == expected
    assert "--kill-on-bad-exit=1" in (tmp_path / "slurm" / "seen").read_text()


@pytest.mark.fault(42, "a job of slurm that does not know its checkout")
def test_a_job_that_is_submitted_elsewhere_says_what_it_needs(tmp_path: Path) -> None:
    done = call("slurm.sbatch", CONFIG, **{**_slurm(tmp_path / "slurm"), "WORM_DIST": ""})
    assert done.returncode == 2
    expected = f"slurm.sbatch: {tmp_path} is no checkout of worm_dist; set WORM_DIST to one\n"
    assert done.stderr == expected


@pytest.mark.parametrize("script", ["torchrun", "slurm.sbatch"])
@pytest.mark.fault(13, "no restart is burned")
def test_a_typo_ends_before_any_rank_is_started(tmp_path: Path, script: str) -> None:
    """torchrun would have started all ranks anew, as often as it may."""
    more = {"MAX_RESTARTS": "3", **_slurm(tmp_path / "slurm")}
    done = call(script, CONFIG, "--search.prune_ratoi", "0.3", **more)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "did you mean search.prune_ratio?" in done.stderr
    assert not (tmp_path / "slurm" / "seen").exists()


@pytest.mark.parametrize("word", ["--local_rank=1", "--local-rank=1"])
def test_what_launchers_put_in_front_is_no_setting(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, "train", str(CONFIG), "--check"]) == 0
    assert capsys.readouterr().out.endswith("digits.yaml: the settings are valid\n")
    assert main([word, "train", "--check", str(CONFIG), "--epochs=0"]) == 2


@pytest.mark.parametrize(
    ("stamp", "extras", "complete"),
    [
        ("{now}\n", "", True),
        ("{now}\n", "test", False),
        ("{now}\ntest\nmpich\ndeepspeed\n", "deepspeed test", True),
        ("{now}\ntest\nmpich\n", "mpi", False),
        ("1 2\ntest\n", "test", False),
        ("1 2\n", "", False),
        ("", "", False),
    ],
)
def test_what_is_installed_is_not_installed_again(
    tmp_path: Path, stamp: str, extras: str, complete: bool
) -> None:
    for name in ("launch/environment", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    with (tmp_path / "pyproject.toml").open() as wanted:
        now = subprocess.check_output("cksum", stdin=wanted, text=True).strip()
    (tmp_path / ".venv" / "installed").write_text(stamp.format(now=now))
    asked = f"source {tmp_path}/launch/environment && installed '{extras}'"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert (done.returncode == 0) == complete
    assert done.stdout == done.stderr == ""
