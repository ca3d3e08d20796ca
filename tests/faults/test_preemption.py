"""A run that is told to stop, or killed, and goes on with the same command."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.courses import ALL_PHASES, curves_of, differences_of_runs, under_zero
from tests.faults.driver import Act, Driver, Fault, Run
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.distributed.graceful_stop import StopCoordinator

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


def _ask_to_stop(*signals: tuple[int, signal.Signals]) -> None:
    """Send signals, and wait until this rank has been told that all are to stop: on a busy machine
    a few steps are faster than two messages.

    Another rank's signal may have told it already, so it is asked what it knows, not when."""
    (halt,) = (found for found in gc.get_objects() if isinstance(found, StopCoordinator))
    for pid, number in signals:
        os.kill(pid, number)
    deadline = time.monotonic() + 60
    while not halt.requested:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _terminate(real: Act, *args: Any) -> Any:
    _ask_to_stop((os.getpid(), signal.SIGTERM))
    return real(*args)


def _terminate_by_another_signal(real: Act, *args: Any) -> Any:
    _ask_to_stop((os.getpid(), signal.SIGUSR1))
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


@pytest.mark.timeout(500)
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


@pytest.mark.timeout(300)
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
    _ask_to_stop(*((pid, signal.SIGTERM) for pid in [*map(int, children), os.getpid()]))
    return real(*args)


def _fork_loaders(real: Act, *args: Any, **kwargs: Any) -> Any:
    """As on the command line; in the fork server's children, loaders would import torch again."""
    return real(*args, **{**kwargs, "multiprocessing_context": "fork"})


@pytest.mark.timeout(300)
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


@pytest.mark.timeout(300)
@pytest.mark.fault(4, "torchrun takes it for no failure")
def test_under_torchrun_a_rank_that_was_stopped_is_not_started_again(driver: Driver) -> None:
    """It would start all ranks anew, on a machine that is about to go."""
    fault = Fault.do(_terminate, rank=1, step=2)
    end = driver.under_torchrun(2, Run((NO_PICTURES, fault), ALL_PHASES), max_restarts=1)
    assert end.exitcode == 0, end.said
    assert end.printed.count("* stopped after step") == 1 and "* goes on" not in end.printed
    assert _step_of_newest(driver.out) in (2, 3)
    assert not (driver.out / "result.json").exists()


@pytest.mark.timeout(300)
@pytest.mark.fault(1, "torchrun starts anew after a SIGKILL, from a checkpoint")
def test_killed_and_started_again_by_torchrun_it_ends_the_same(
    driver: Driver, unbroken: Path
) -> None:
    _assert_killed_under_torchrun_it_goes_on(driver, ALL_PHASES, step=14, saved_at=12)
    _assert_same_end(driver, unbroken)


def _assert_killed_under_torchrun_it_goes_on(
    driver: Driver, settings: Mapping[str, Any], step: int, saved_at: int
) -> None:
    fault = Fault.kill(1, step).only_first_attempt()
    run = Run((NO_PICTURES, fault), {**settings, "checkpoint.every": "3ba"})
    end = driver.under_torchrun(2, run, max_restarts=1)
    assert end.exitcode == 0, end.said
    assert f"* goes on from step {saved_at}" in end.printed


# ---- DeepSpeed -----------------------------------------------------------------------------------


@pytest.mark.timeout(400)
@pytest.mark.fault(4, "under ZeRO stage 1, in the draw")
def test_stopped_in_the_draw_under_zero(driver: Driver, tmp_path: Path) -> None:
    """Its engine has been built anew by then."""
    pytest.importorskip("deepspeed")
    settings = under_zero(1)
    ends = driver(2, Run((NO_PICTURES, Fault.do(_terminate, rank=1, step=2).at(DRAW)), settings))
    assert [(end.exitcode, end.said) for end in ends] == [(75, "")] * 2
    assert DRAWN_AT <= _step_of_newest(driver.out) <= DRAWN_AT + 1
    (tmp_path / "unbroken").mkdir()
    _assert_goes_on(driver, _unbroken(tmp_path / "unbroken", settings), settings)


@pytest.mark.timeout(400)
@pytest.mark.fault(1, "torchrun starts anew under ZeRO stage 2, while channels fade")
def test_killed_while_channels_fade_under_zero(driver: Driver, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    settings = under_zero(2)
    _assert_killed_under_torchrun_it_goes_on(driver, settings, step=7, saved_at=6)
    (tmp_path / "unbroken").mkdir()
    _assert_same_end(driver, _unbroken(tmp_path / "unbroken", settings))
