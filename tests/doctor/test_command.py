"""The doctor as people meet it: real processes, their exit codes, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.programs import call, variables_of_ranks
from worm_dist.doctor.finding import Finding
from worm_dist.doctor.launch import launch
from worm_dist.doctor.report import Report
from worm_dist.doctor.storage import storage
from worm_dist.training.run_config import RunConfig

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
DOCTOR = ["-m", "worm_dist", "doctor"]


def _texts(report: dict[str, Any], topic: str, level: str) -> str:
    return "\n".join(
        finding["text"]
        for finding in report["findings"]
        if (finding["topic"], finding["level"]) == (topic, level)
    )


def test_a_run_that_can_start_has_no_problem(tmp_path: Path) -> None:
    (ended,) = call([*DOCTOR, CONFIG, "--search.window", "20", "--json"], tmp_path)
    assert ended.exitcode == 0, ended.err
    report = json.loads(ended.out)
    assert report["problems"] == 0 and report["backend"] == "gloo"
    assert "torch 2." in _texts(report, "software", "ok")
    assert _texts(report, "launcher", "ok") == "none: one process"
    assert "6 channel groups with 448 channels" in _texts(report, "groups", "ok")
    assert "sgd, tf32, gloo, truncation hard" in _texts(report, "settings", "ok")
    assert "search.window: 20 masks are never reached" in _texts(report, "settings", "note")
    assert "22 steps an epoch" in _texts(report, "data", "ok")
    assert "5 checkpoints take about" in _texts(report, "storage", "ok")
    assert [group["name"] for group in report["groups"]][:2] == ["features.0", "features.3"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(13, "doctor: a mistake in the settings, and data that are not there")
def test_a_problem_is_told_and_has_its_exit_code(tmp_path: Path) -> None:
    """All other findings are there too."""
    words = [*DOCTOR, CONFIG, "--data.name=cifar10", "--data.root=/nowhere"]
    (ended,) = call(words, tmp_path)
    assert ended.exitcode == 1, ended.err
    (line,) = (line for line in ended.out.splitlines() if line.startswith("problem"))
    assert "data" in line and "/nowhere" in ended.out
    assert "ok       launcher" in ended.out and "1 problem, no notes" in ended.out
    (ended,) = call([*DOCTOR, CONFIG, "--search.prune_ratoi", "0.3", "--json"], tmp_path)
    report = json.loads(ended.out)
    assert (ended.exitcode, report["problems"]) == (1, 1)
    assert "did you mean search.prune_ratio?" in _texts(report, "settings", "problem")


@pytest.mark.fault(21, "doctor: a rank that is not there")
def test_a_rank_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    first, _ = variables_of_ranks(2)
    (ended,) = call([*DOCTOR, "--timeout", "2", "--json"], tmp_path, [first])
    assert ended.exitcode == 1, ended.err
    assert "rank 1 is not there after 2 seconds" in _texts(
        json.loads(ended.out), "backend", "problem"
    )


@pytest.mark.slow("starts programs on two ranks")
@pytest.mark.parametrize(
    ("body", "seconds", "said"),
    [
        ("raise OSError('no disk')", 60, "rank 1: data.name: mine:data raised OSError: no disk"),
        ("time.sleep(600)", 5, "the start of the run has not returned within 5 seconds"),
    ],
)
@pytest.mark.fault(21, "doctor: a rank that fails or hangs")
def test_a_rank_that_fails_or_hangs_alone_is_told_by_rank_zero(
    tmp_path: Path, body: str, seconds: int, said: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, time\n"
        "from worm_dist.training.data import load_data\n"
        "from worm_dist.training.run_config import DataConfig\n\n"
        "def data(config):\n"
        f"    if os.environ['RANK'] == '1':\n        {body}\n"
        "    return load_data(DataConfig())\n"
    )
    limit = f"--distributed.startup_timeout_seconds={seconds}"
    words = [*DOCTOR, CONFIG, "--data.name", "mine:data", "--json", limit]
    first, second = call(words, tmp_path, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (1, 1), first.err + second.err
    report = json.loads(first.out)
    told = _texts(report, "data", "problem") + _texts(report, "backend", "problem")
    assert told.startswith(said)
    assert [place["rank"] for place in report["ranks"]] == [0, 1]


@pytest.mark.slow("starts torchrun")
def test_ranks_under_torchrun_reach_one_another(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", *DOCTOR, str(CONFIG), "--search.dense", "[features.3]"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torchrun: rank 0 of 2, 0 of 2 on this host" in done.stdout
    assert "gloo: all 2 ranks reach one another" in done.stdout
    assert "all-reduce of 4 bytes in" in done.stdout
    assert "0 on cpu, 1 on cpu" in done.stdout
    assert "stays dense" in done.stdout and "no problems" in done.stdout


@pytest.mark.slow("starts DeepSpeed's engine")
def test_what_does_not_fit_together_is_what_a_run_would_say(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    words = [*DOCTOR, CONFIG, "--backend", "deepspeed", "--truncation.compression", "bf16"]
    (ended,) = call(words, tmp_path)
    assert ended.exitcode == 1, ended.err
    told = " ".join(ended.out.split())
    assert "truncation.compression 'bf16' is not supported under DeepSpeed" in told


def test_variables_of_launchers_are_explained() -> None:
    rank_info, (found, in_slurm) = launch({"SLURM_JOB_ID": "7"})
    assert rank_info is not None and rank_info.world_size == 1
    assert (found.level, in_slurm.level) == ("ok", "note")
    assert "SLURM_JOB_ID=7, but this is no step of srun" in in_slurm.text
    rank_info, (problem,) = launch({"RANK": "0"})
    assert rank_info is None and problem.level == "problem"
    variables = {**variables_of_ranks(2)[1], "TORCHELASTIC_RUN_ID": "x", "SLURM_STEP_ID": "0"}
    rank_info, (found, outer) = launch({**variables, "SLURM_PROCID": "0"})
    assert found.text.startswith("torchrun: rank 1 of 2, 1 of 2 on this host; rank zero at 127")
    assert outer.text == "SLURM_PROCID=0: of srun, outside of torchrun; not used"


def test_too_little_room_is_a_problem(tmp_path: Path) -> None:
    config = RunConfig()
    fits, full = (storage(tmp_path / "runs" / "x", config, size) for size in (1, 1 << 60))
    assert (fits.level, full.level) == ("ok", "problem")
    assert "lower checkpoint.keep_last" in full.text
    (tmp_path / "file").touch()
    assert storage(tmp_path / "file" / "x", config, 1).level == "problem"


def test_other_ranks_add_what_rank_zero_has_not() -> None:
    own = Finding("data", "note", "few samples")
    report = Report([own])
    other = Finding("data", "problem", "no samples")
    report.add_other_ranks([[own], [own, other, Finding("data", "ok", "x")], [other]])
    assert report.findings == [own, Finding("data", "problem", "rank 1: no samples")]
    assert report.num_problems == 1
