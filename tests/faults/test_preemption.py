"""A run that is told to stop, or killed, and goes on with the same command."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.courses import ALL_PHASES, curves_of, differences_of_runs, under_zero
from tests.faults.driver import Act, Driver, Fault, Run, busy
from tests.faults.stopping import ask_to_stop
from worm_dist.checkpoint.manager import CheckpointManager

pytestmark = pytest.mark.slow("stops whole runs and goes on with them")

TEST = "worm_dist.training.trainer:evaluate"
CHECK = "worm_dist.engine.engine:Engine.check"
DRAW = "worm_dist.engine.engine:Engine.draw"
STAGE_AT, DRAWN_AT = 6, 10


def _nothing(real: Act, *args: Any) -> None:
    pass


NO_PICTURES = Fault.do(_nothing, rank=None, step=None).at(
    "worm_dist.training.reporting.tensorboard:TensorBoardLog.figures"
)
"""They take most of a second."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder."""
    return _unbroken(tmp_path_factory.mktemp("unbroken"), ALL_PHASES)


def _unbroken(folder: Path, settings: Mapping[str, Any]) -> Path:
    driver = Driver(folder)
    ends = driver(2, Run((NO_PICTURES,), settings))
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    return driver.out


def _terminate(real: Act, *args: Any, **kwargs: Any) -> Any:
    ask_to_stop((os.getpid(), signal.SIGTERM))
    return real(*args, **kwargs)


def _killed_once_saved(real: Act, trainer: Any, *args: Any) -> Any:
    """A kill when the newest save is complete: what a rank has not yet written when it is killed is
    lost, and the checkpoint with it."""
    while _step_of_newest(trainer._checkpointer._folder) < trainer.engine.step:
        time.sleep(0.01)  # the ranks write in the background
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate_by_another_signal(real: Act, *args: Any) -> Any:
    ask_to_stop((os.getpid(), signal.SIGUSR1))
    return real(*args)


def _step_of_newest(out: Path) -> int:
    newest = CheckpointManager(out / "checkpoints").newest()
    assert newest is not None
    return newest.step


def _assert_goes_on(
    driver: Driver, unbroken: Path, settings: Mapping[str, Any] = ALL_PHASES
) -> None:
    """With the same command, to the same end."""
    ends = driver(2, Run((NO_PICTURES,), settings))
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    assert "* goes on from step" in ends[0].printed
    _assert_same_end(driver, unbroken)
    assert [path.name for path in driver.out.parent.glob("run*")] == ["run"], "nothing put aside"


def _assert_same_end(driver: Driver, unbroken: Path) -> None:
    found = list(differences_of_runs(unbroken, driver.out))
    assert not found, "\n".join(found[:20])
    assert curves_of(unbroken) == curves_of(driver.out)


@pytest.mark.fault(4, "in a step, a check, a draw and in tests; to one rank or to all")
def test_all_ranks_stop_at_one_step_and_go_on(driver: Driver, unbroken: Path) -> None:
    """Again and again in one run."""
    for fault, first, last in (
        (Fault.do(_terminate, rank=1, step=2), 2, 3),
        (Fault.do(_terminate, rank=1, step=1).at(CHECK), 4, 5),
        (Fault.do(_terminate, rank=1, step=1).at(DRAW), STAGE_AT, STAGE_AT + 1),
        (Fault.do(_terminate, rank=1, step=1).at(TEST), 8, 8),
        (Fault.do(_terminate, rank=0, step=2).at(TEST), DRAWN_AT, DRAWN_AT),
        (Fault.do(_terminate, rank=1, step=2).at(TEST), DRAWN_AT, DRAWN_AT),
        (Fault.do(_terminate_by_another_signal, rank=0, step=3), 13, 14),
        (Fault.do(_terminate, rank=None, step=3), 16, 17),
    ):
        ends = driver(2, Run((NO_PICTURES, fault), ALL_PHASES))
        assert [(end.exitcode, end.said) for end in ends] == [(75, "")] * 2
        step = _step_of_newest(driver.out)
        assert first <= step <= last
        assert f"* stopped after step {step}; " in ends[0].printed
        assert not (driver.out / "result.json").exists()
    _assert_goes_on(driver, unbroken)


@pytest.mark.fault(4, "in the draw itself")
def test_a_draw_is_finished_before_all_stop(driver: Driver, unbroken: Path) -> None:
    ends = driver(2, Run((NO_PICTURES, Fault.do(_terminate, rank=0, step=2).at(DRAW)), ALL_PHASES))
    assert [(end.exitcode, end.said) for end in ends] == [(75, "")] * 2
    assert DRAWN_AT <= _step_of_newest(driver.out) <= DRAWN_AT + 1
    _assert_goes_on(driver, unbroken)


def _terminate_with_loaders(real: Act, *args: Any) -> Any:
    """As a scheduler does: every process that there is."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert len(children) >= 2, children
    ask_to_stop(*((pid, signal.SIGTERM) for pid in [*map(int, children), os.getpid()]))
    return real(*args)


def _fork_loaders(real: Act, *args: Any, **kwargs: Any) -> Any:
    """As on the command line; in the fork server's children, loaders would import torch again."""
    return real(*args, **{**kwargs, "multiprocessing_context": "fork"})


@pytest.mark.fault(4, "to the loader processes too")
def test_loaders_work_until_their_rank_stops(driver: Driver, unbroken: Path) -> None:
    """A killed loader made an error of the preemption: nothing was saved."""
    settings = {**ALL_PHASES, "data.num_workers": 2}
    faults = (
        NO_PICTURES,
        Fault.do(_fork_loaders, rank=None, step=None).at(
            "worm_dist.training.data.loaders:DataLoader"
        ),
        Fault.do(_terminate_with_loaders, rank=1, step=5),
    )
    ends = driver(2, Run(faults, settings))
    assert [(end.exitcode, end.said) for end in ends] == [(75, "")] * 2
    assert _step_of_newest(driver.out) in (5, 6)
    _assert_goes_on(driver, unbroken)


@pytest.mark.fault(1, "torchrun starts anew after a SIGKILL, from a checkpoint")
@pytest.mark.fault(1, "torchrun ends soon once no restart is left")
@pytest.mark.fault(2, "torchrun shows the traceback of the rank that raised")
def test_killed_and_started_again_by_torchrun_it_ends_the_same(
    driver: Driver, unbroken: Path
) -> None:
    """A kill in the first attempt, and a bug in the second one."""
    kill = Fault.do(_killed_once_saved, rank=1, step=7)
    faults = kill.in_attempt(0), Fault.raise_(1, step=5).in_attempt(1)
    settings = {**ALL_PHASES, "checkpoint.every": "3ba"}
    end = driver.under_torchrun(2, Run((NO_PICTURES, *faults), settings), max_restarts=1)
    assert end.exitcode == 1, end.said
    assert "exitcode: -9" in end.said and "rank 1 is gone" in end.said
    assert end.printed.count("* goes on from step 6") == 1
    root = end.said[end.said.index("Root Cause") :]
    assert "rank      : 1" in root and "exitcode  : 1" in root
    assert "step 11" in end.said and "ValueError: a bug" in root
    # The rank that is left ends by itself; torchrun would wait for 30 seconds, each time.
    assert end.seconds < busy(25), end
    assert not (driver.out / "result.json").exists()
    _assert_goes_on(driver, unbroken, settings)


@pytest.mark.fault(1, "torchrun starts anew under ZeRO stage 2, while channels fade")
@pytest.mark.fault(4, "torchrun takes it for no failure, under ZeRO stage 2, in the draw")
def test_killed_and_stopped_under_zero_it_ends_the_same(driver: Driver, tmp_path: Path) -> None:
    """A kill in the first attempt; in the second one a signal, after which torchrun must not start
    all ranks anew, on a machine that is about to go.  DeepSpeed's engine has been built anew by
    then."""
    pytest.importorskip("deepspeed")
    settings = {**under_zero(2), "checkpoint.every": "3ba"}
    stop = Fault.do(_terminate, rank=1, step=1).at(DRAW)
    kill = Fault.do(_killed_once_saved, rank=1, step=7)
    faults = kill.in_attempt(0), stop.in_attempt(1)
    end = driver.under_torchrun(2, Run((NO_PICTURES, *faults), settings), max_restarts=2)
    assert end.exitcode == 0, end.said
    assert "accelerator" not in end.said + end.printed, "DeepSpeed finds no GPU, and says so"
    assert end.printed.count("* goes on from step 6") == end.printed.count("* goes on") == 1
    assert end.printed.count("* stopped after step") == 1
    assert DRAWN_AT <= _step_of_newest(driver.out) <= DRAWN_AT + 1
    assert not (driver.out / "result.json").exists()
    (tmp_path / "unbroken").mkdir()
    _assert_goes_on(driver, _unbroken(tmp_path / "unbroken", settings), settings)
