"""Every launcher starts the same training: real launchers, through the scripts in launch/."""

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

from worm_dist.__main__ import main

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
CONFIG = "configs/digits.yaml"
SHORT = ["--epochs=1", "--search.every=11ba"]  # two masks
OPEN_MPI = shutil.which("mpirun.openmpi") or ""

pytestmark = [
    pytest.mark.timeout(170),
    pytest.mark.skipif(
        Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(),
        reason="the scripts use .venv; run the tests with it",
    ),
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


def _call(
    script: str, *words: object, **environment: str
) -> tuple[int, str, subprocess.CompletedProcess[str]]:
    """Exit code, what was said on stderr, and the rest."""
    inherited = {key: os.environ[key] for key in os.environ if not key.startswith("PYTEST")}
    done = subprocess.run(
        [str(LAUNCH / script), *map(str, words)],
        cwd="/",
        env={**inherited, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done.returncode, done.stderr, done


def _trained(folder: Path, script: str, **environment: str) -> Mapping[str, Any]:
    """The result of a short run on two ranks."""
    code, said, _ = _call(script, CONFIG, *SHORT, "--out", folder, **environment)
    assert code == 0, said
    result: Mapping[str, Any] = json.loads((folder / "result.json").read_text())
    assert (result["world_size"], result["checks"]) == (2, 2)
    return result


def _slurm(folder: Path) -> dict[str, str]:
    """sbatch's environment, and an srun on the PATH."""
    folder.mkdir()
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SEEN": str(folder / "seen"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "1",
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of torchrun's mask."""
    result = _trained(tmp_path_factory.mktemp("torchrun") / "run", "torchrun")
    assert isinstance(result["mask_digest"], str)
    return result["mask_digest"]


def test_deepspeed_starts_the_same_training(tmp_path: Path, expected: str) -> None:
    assert _trained(tmp_path / "run", "deepspeed")["mask_digest"] == expected


def test_mpirun_starts_the_same_training(tmp_path: Path, expected: str) -> None:
    """Rank one, which has nothing to write, ends first.  The mpirun of MPICH then killed rank zero
    before it had written result.json, and ended with 0: rank one had begun MPI, and had left
    without the C library's exit handlers."""
    assert _trained(tmp_path / "run", "mpirun")["mask_digest"] == expected


@pytest.mark.skipif(not OPEN_MPI, reason="the machine has no Open MPI")
def test_the_mpirun_of_open_mpi_does_too(tmp_path: Path, expected: str) -> None:
    result = _trained(
        tmp_path / "run",
        "mpirun",
        MPIRUN=f"{OPEN_MPI} --allow-run-as-root --oversubscribe",
        MPI4PY_LIBMPI="libmpi.so.40",
    )
    assert result["mask_digest"] == expected


def test_a_job_of_slurm_is_the_same_training(tmp_path: Path, expected: str) -> None:
    result = _trained(tmp_path / "run", "slurm.sbatch", **_slurm(tmp_path / "slurm"))
    assert result["mask_digest"] == expected
    assert "--kill-on-bad-exit=1" in (tmp_path / "slurm" / "seen").read_text()


@pytest.mark.parametrize("script", ["torchrun", "slurm.sbatch"])
def test_a_typo_ends_before_any_rank_is_started(tmp_path: Path, script: str) -> None:
    """torchrun would have started all ranks anew, as often as it may."""
    more = {"MAX_RESTARTS": "3", **_slurm(tmp_path / "slurm")}
    code, said, _ = _call(script, CONFIG, "--search.prune_ratoi", "0.3", **more)
    assert code == 2
    assert said.count("\n") == 1 and "did you mean search.prune_ratio?" in said
    assert not (tmp_path / "slurm" / "seen").exists()


@pytest.mark.parametrize("word", ["--local_rank=1", "--local-rank=1"])
def test_what_launchers_put_in_front_is_no_setting(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, "train", str(ROOT / CONFIG), "--check"]) == 0
    assert capsys.readouterr().out.endswith("digits.yaml: the settings are right\n")
    assert main([word, "train", "--check", str(ROOT / CONFIG), "--epochs=0"]) == 2


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
