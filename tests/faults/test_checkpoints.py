"""Checkpoints that are damaged, foreign or not to be written, and the runs that meet them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import CONFIG, SMALL, Driver, Fault, Run
from tests.faults.training import train
from tests.ranks import Outcome, Ranks
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.checkpoint.lock import run_lock
from worm_dist.training.config_file import read_run_config
from worm_dist.training.reporting.result import Result
from worm_dist.training.resume_config import changes, fixed_settings
from worm_dist.training.run_folder import open_run_folder
from worm_dist.training.trainer import Trainer

pytestmark = pytest.mark.slow("trains runs and goes on with them")

DENSE: dict[str, Any] = {"preset": "dense", "epochs": 2}
NEWEST, OLDER = 7, 6
"""Steps of the run that was broken off; saved after each."""


def _broken_off(out: Path) -> None:
    train(out, heed=lambda halt: halt.stop_at(NEWEST), **{**DENSE, "checkpoint.every": "1ba"})


@pytest.fixture
def out(ranks: Ranks, tmp_path: Path) -> Path:
    """The folder of a run on one rank."""
    ranks(1, _broken_off, tmp_path / "run")
    return tmp_path / "run"


def _go_on(out: Path, resume: str, settings: dict[str, Any]) -> tuple[int, list[str]]:
    """The step that was gone on from, 0 for a new run, and the warnings."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("worm_dist").addHandler(handler)
    first: list[int] = []
    real = Trainer.run

    def run(self: Trainer) -> Result:
        first.append(self.engine.step)
        return real(self)

    Trainer.run = run  # type: ignore[method-assign]
    train(out, resume, **{**DENSE, **settings})
    return first[0], told


def _gone_on(
    ranks: Ranks, out: Path, resume: str = "auto", **settings: Any
) -> tuple[int, list[str]]:
    ((step, told),) = ranks(1, _go_on, out, resume, settings)
    return step, told


def _refusal(ranks: Ranks, out: Path, resume: str = "auto", **settings: Any) -> Outcome:
    (outcome,) = ranks.outcomes(1, _go_on, out, resume, settings)
    return outcome


def _newest(out: Path) -> Path:
    return out / "checkpoints" / f"step-{NEWEST}"


# ---- damage --------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.fault(7, "truncated, emptied or missing, file by file, in a run")
@pytest.mark.fault(8, "a run goes on from the one before")
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("run.safetensors", _truncate),
        ("run.safetensors", _flip_a_bit),
        ("run.json", _empty),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_or_by_name_refused(
    ranks: Ranks, out: Path, file: str, damage: Callable[[Path], Any]
) -> None:
    damage(_newest(out) / file)
    refused = _refusal(ranks, out, str(_newest(out)))
    assert refused.error == "CheckpointError" and file in refused.text
    step, told = _gone_on(ranks, out)
    assert step == OLDER
    assert any(f"checkpoint step-{NEWEST} is skipped: " in line for line in told)


@pytest.mark.fault(6, "leftovers and a `latest` in a run's folder")
def test_leftovers_are_swept(ranks: Ranks, out: Path) -> None:
    folder = out / "checkpoints"
    (folder / "latest").write_text("garbage")
    (folder / "step-99.tmp-abc").mkdir()
    assert _gone_on(ranks, out) == (NEWEST, [])
    assert not (folder / "step-99.tmp-abc").exists()


class _Payload:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.mark.fault(10, "planted for a run to find, in the place of every file")
@pytest.mark.parametrize("file", ["manifest.json", "run.json", "run.safetensors"])
def test_a_planted_pickle_is_not_run(ranks: Ranks, out: Path, tmp_path: Path, file: str) -> None:
    (_newest(out) / file).write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    refused = _refusal(ranks, out, str(_newest(out)))
    assert refused.error == "CheckpointError"
    assert _gone_on(ranks, out)[0] == OLDER
    assert not (tmp_path / "ran").exists()


# ---- the run's folder ----------------------------------------------------------------------------


@pytest.mark.fault(12, "settings that are settled, by name and by folder")
def test_other_settings_do_not_go_on(ranks: Ranks, out: Path) -> None:
    other: dict[str, Any] = {"optimizer.lr": 0.2}
    refused = _refusal(ranks, out, str(_newest(out)), **other)
    assert refused.error == "ConfigError"
    assert (
        "the config differs from the checkpoint (optimizer.lr: 0.1 -> 0.2); use the" in refused.text
    )
    step, (told,) = _gone_on(ranks, out, **other)
    assert step == 0
    (aside,) = out.parent.glob("run.*")
    why = "another config: optimizer.lr: 0.1 -> 0.2"
    assert told == f"{out}: the earlier run there ({why}) is moved to {aside}"
    assert _newest(aside).exists(), "it is put aside, and not lost"


@pytest.mark.fault(12, "settings that may change")
def test_what_a_host_decides_and_how_long_to_train_may_change(ranks: Ranks, out: Path) -> None:
    settings: dict[str, Any] = {
        "epochs": 3,
        "data.num_workers": 1,
        "distributed.backend": "gloo",
        "checkpoint.keep_last": 2,
        "checkpoint.every": "1ep",
    }
    assert _gone_on(ranks, out, **settings) == (NEWEST, [])
    assert json.loads((out / "result.json").read_text())["status"] == "dense"
    assert Checkpoint(out / "checkpoints" / "step-24").manifest.value is not None


@pytest.mark.fault(12, "every key that the documentation names, and others")
def test_what_may_change_and_what_may_not() -> None:
    def told(key: str, value: str) -> list[str]:
        before, after = (read_run_config(CONFIG, replaced) for replaced in ([], [(key, value)]))
        assert before != after
        return changes(fixed_settings(before), fixed_settings(after))

    may = {
        "epochs": "21",
        "name": "other",
        "data.root": "/elsewhere",
        "data.num_workers": "1",
        "distributed.timeout_seconds": "7",
        "distributed.startup_timeout_seconds": "7",
        "distributed.backend": "nccl",
        "divergence.check_every": "3ba",
        "ticket.recalibrate_batches": "3",
        "checkpoint.every": "3ba",
        "checkpoint.keep_last": "7",
        "checkpoint.on_error": "continue",
    }
    assert not [(key, told(key, value)) for key, value in may.items() if told(key, value)]
    for key, value in {
        "seed": "7",
        "data.batch_size": "32",
        "optimizer.momentum": "0.5",
        "schedule.warmup_epochs": "1",
        "search.grouping": "layer",
        "truncation.frozen_weights": "hold",
        "ticket.round_to": "4",
        "precision": "bf16",
        "model.arguments": "{widths: [8, M, 16]}",
    }.items():
        (line,) = told(key, value)
        assert line.startswith(f"{key}: ") and " -> " in line
    assert "distributed.backend: 'auto' -> 'deepspeed'" in told("distributed.backend", "deepspeed")


@pytest.mark.fault(12, "a format of the future")
def test_a_format_of_the_future_is_refused(ranks: Ranks, out: Path) -> None:
    path = _newest(out) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 4'))
    refused = _refusal(ranks, out, str(_newest(out)))
    assert refused.error == "CheckpointError" and "found format 4" in refused.text


def test_what_resume_means(ranks: Ranks, out: Path) -> None:
    """``never`` puts aside; a name goes back, and what came after it is given up; a run that is
    over is put aside."""
    older = _newest(out).with_name(f"step-{OLDER}")
    assert _gone_on(ranks, out, str(older))[0] == OLDER
    assert (out / "result.json").exists()
    assert _gone_on(ranks, out)[0] == 0
    assert _gone_on(ranks, out, "never")[0] == 0
    assert len(list(out.parent.glob("run.*"))) == 2


def test_from_another_folder(ranks: Ranks, out: Path) -> None:
    """The first one stays as it is."""
    before = sorted(path.name for path in out.rglob("*"))
    assert _gone_on(ranks, out.with_name("other"), str(_newest(out)))[0] == NEWEST
    assert sorted(path.name for path in out.rglob("*")) == before
    assert (out.with_name("other") / "result.json").exists()


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("resume", ["never", f"step-{OLDER}"])
def test_a_launcher_that_starts_again_means_its_own_run(out: Path, resume: str, name: str) -> None:
    """It repeats the command line, and with it the words that began the run."""
    config = read_run_config(CONFIG, list(SMALL.items()))
    resume = resume if resume == "never" else str(out / "checkpoints" / resume)
    with open_run_folder(out, resume, config, 1, {name: "1"}) as folder:
        assert folder.checkpoint is not None and folder.checkpoint.step == NEWEST


@pytest.mark.fault(23, "a run that is at work in the folder")
def test_the_second_run_is_refused(ranks: Ranks, out: Path) -> None:
    with run_lock(out):
        refused = _refusal(ranks, out)
    assert refused.error == "ConfigError" and "another run holds this directory" in refused.text
    assert f"process {os.getpid()} on " in refused.text


# ---- the disk ------------------------------------------------------------------------------------


def _limit_files(real: Any, *args: Any) -> Any:
    """From now on a file may have a few bytes, as on a full disk."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()  # the one of the step before
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    return real(*args)


@pytest.mark.fault(9, "a limit on the size of files, in a run; to stop or to train on")
@pytest.mark.parametrize(("on_error", "exitcode"), [("stop", 3), ("continue", 0)])
def test_a_full_disk_stops_the_run_or_not(driver: Driver, on_error: str, exitcode: int) -> None:
    full = Fault.do(_limit_files, rank=0, step=6)
    settings = {"checkpoint.every": "2ba", "checkpoint.on_error": on_error}
    ends = driver(2, Run((full,), settings))
    assert [end.exitcode for end in ends] == [exitcode] * 2
    assert "disk full" in ends[0].said
    folder = driver.out / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    assert Checkpoint(folder / "step-4").step == 4
    if on_error == "continue":
        assert "; training goes on" in ends[0].said
        result = json.loads((driver.out / "result.json").read_text())
        assert "checkpoints" in result["failed_writes"]


def _kill_by_and_by(real: Any, *args: Any) -> Any:
    if os.fork() == 0:  # a process of its own, so that it strikes wherever the rank is by then
        parent = os.getppid()
        time.sleep(0.005 * args[0].engine.step)
        os.kill(parent, signal.SIGKILL)
        os._exit(0)
    return real(*args)


@pytest.mark.fault(5, "a run is killed while it saves")
def test_killed_while_it_saves_a_run_goes_on(driver: Driver) -> None:
    settings = {"checkpoint.every": "1ba", "epochs": 6}  # long enough to be struck three times
    for _ in range(3):
        ends = driver(1, Run((Fault.do(_kill_by_and_by, rank=0, step=3),), settings))
        assert ends[0].exitcode == -9
    ends = driver(1, Run((), settings))
    assert (ends[0].exitcode, ends[0].said) == (0, "")
    assert "* goes on from step" in ends[0].printed
