"""What keeps a run from going on is raised on every rank, with the same words and exit code.

Each time one rank alone meets it.  There is no watchdog here, and collectives wait for ten minutes:
a rank that waits for one that has failed is seen to hang.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.faults.courses import ALL_PHASES
from tests.faults.driver import Driver, Fault, Run
from tests.faults.training import train
from tests.ranks import Ranks
from worm_dist import WormError
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.manifest import CheckpointInfo
from worm_dist.training import build, run, share_state, training_state
from worm_dist.training.checkpointer import RUN
from worm_dist.training.run_folder import SETTINGS

pytestmark = pytest.mark.slow("trains a run and goes on with it many times")

STEP = 5
SETTINGS_OF_RUN: dict[str, Any] = {**ALL_PHASES, "checkpoint.every": "2ba"}
Told = tuple[str, str, int]
"""Type, text and exit code of an error."""


def _broken_off(out: Path) -> None:
    train(out, heed=lambda halt: halt.stop_at(STEP), **SETTINGS_OF_RUN)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that was broken off; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    Ranks(folder)(2, _broken_off, folder / "run")
    return folder / "run"


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def _going_on(folders: list[Path], resume: str, meets: Obstacle | None) -> list[Told]:
    """What the ranks are told, who exchange it: so none is left in another collective."""
    told = "", "", 0
    with pytest.MonkeyPatch.context() as patch:
        if meets is not None:
            meets(patch, dist.get_rank())
        try:
            train(folders[dist.get_rank()], resume, **SETTINGS_OF_RUN)
        except WormError as error:
            told = type(error).__name__, str(error), error.exit_code
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, told)
    return of_all


Obstacle = Callable[[pytest.MonkeyPatch, int], object]


def _told(
    ranks: Ranks, folders: list[Path], resume: str = "auto", meets: Obstacle | None = None
) -> Told:
    """What all ranks alike are told."""
    call = len(folders), _going_on, folders, resume, meets
    outcomes = ranks.outcomes(*call, group_timeout=600, idle_limit=20)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
        assert len(set(outcome.value)) == 1, outcome.value
    told: Told = outcomes[0].value[0]
    assert "\n" not in told[1]
    return told


def _refused_with(told: Told, kind: str, exit_code: int, *words: str) -> None:
    assert (told[0], told[2]) == (kind, exit_code), told
    for text in words:
        assert text in told[1], told


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


# ---- choosing the checkpoint ---------------------------------------------------------------------


@pytest.mark.fault(2, "as a resumed run opens its folder")
def test_a_named_checkpoint_is_damaged(ranks: Ranks, out: Path) -> None:
    named = out / "checkpoints" / f"step-{STEP}"
    os.truncate(named / "run.safetensors", 100)
    told = _told(ranks, [out] * 2, str(named))
    _refused_with(told, "CheckpointError", 3, "rank 0: ", "run.safetensors: wanted ")


def test_no_manifest_can_be_read(ranks: Ranks, out: Path) -> None:
    for path in _checkpoints(out):
        (path / "manifest.json").write_text("{}")
    told = _told(ranks, [out] * 2)
    _refused_with(told, "CheckpointError", 3, "rank 0: ", "all checkpoints are damaged: step-")


def test_only_rank_zeros_host_has_what_is_named(ranks: Ranks, out: Path, tmp_path: Path) -> None:
    """Every rank looked for the newest checkpoint in the named folder, before it met the others."""
    (tmp_path / "empty").mkdir()
    told = _told(ranks, [tmp_path / "new"] * 2, str(tmp_path / "empty"))
    _refused_with(told, "CheckpointError", 3, "rank 0: --resume ", "no checkpoint is there")
    assert not _told(ranks, [tmp_path / "new"] * 2, str(out))[0]
    assert (tmp_path / "new" / "result.json").exists()


def test_the_ranks_cannot_share_the_batch(ranks: Ranks, out: Path) -> None:
    told = _told(ranks, [out] * 3)
    _refused_with(told, "CheckpointError", 3, "rank 0: --resume: ", "3 ranks cannot share; start")


def test_they_cannot_share_that_of_another_host(ranks: Ranks, out: Path, tmp_path: Path) -> None:
    told = _told(ranks, [tmp_path / "zero", out, tmp_path / "two"])
    _refused_with(told, "CheckpointError", 3, "rank 1: --resume: ", "3 ranks cannot share; start")


def _cannot_list(patch: pytest.MonkeyPatch, rank: int) -> None:
    real = os.listdir

    def listdir(path: Any) -> Any:
        if str(path).endswith("checkpoints"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    if rank == 1:
        patch.setattr(os, "listdir", listdir)


def test_another_hosts_disk_fails(ranks: Ranks, out: Path, tmp_path: Path) -> None:
    told = _told(ranks, [tmp_path / "zero", out], meets=_cannot_list)
    _refused_with(told, "CheckpointError", 3, "rank 1: ", "cannot be read: Input/output error")


# ---- reading and sharing the state ---------------------------------------------------------------


def _cannot_read(patch: pytest.MonkeyPatch, rank: int) -> None:
    real = Checkpoint.read

    def read(self: Checkpoint, part: str) -> Any:
        if part == RUN:
            raise OSError(errno.EIO, "Input/output error", str(self.path))
        return real(self, part)

    patch.setattr(Checkpoint, "read", read)


def test_the_disk_fails_while_the_state_is_read(ranks: Ranks, out: Path) -> None:
    told = _told(ranks, [out] * 2, meets=_cannot_read)
    wanted = "rank 0: OSError: [Errno 5] Input/output error: '"
    _refused_with(told, "CheckpointError", 3, wanted)


def test_it_is_not_the_state_of_a_run(ranks: Ranks, out: Path) -> None:
    checkpoint = CheckpointManager(out / "checkpoints").newest()
    assert checkpoint is not None
    state, settings = checkpoint.read(RUN), checkpoint.read(SETTINGS)
    del state["report"]
    about = CheckpointInfo(step=STEP, world_size=2, phase="truncate")
    CheckpointManager(out / "checkpoints").save(about, {RUN: state, SETTINGS: settings})
    told = _told(ranks, [out] * 2)
    _refused_with(told, "CheckpointError", 3, "rank 0: ", "report: Field required")


def _no_memory(call: int) -> Obstacle:
    """For the state of all ranks, the first call, or for its own."""
    return _NoMemory(call)


class _NoMemory:
    def __init__(self, call: int) -> None:
        self._call = call

    def __call__(self, patch: pytest.MonkeyPatch, rank: int) -> None:
        real = vars(share_state)["allocate"]

        def allocate(*args: Any) -> Any:
            self._call -= 1
            if not self._call and rank == 1:
                larger = re.sub(
                    rb'"shape": \[(?=\d)', b'"shape": [1099511627776, ', args[0], count=1
                )
                return real(larger, *args[1:])
            return real(*args)

        patch.setattr(share_state, "allocate", allocate)


@pytest.mark.parametrize("call", [1, 2])
def test_a_rank_has_no_memory_for_it(ranks: Ranks, out: Path, call: int) -> None:
    told = _told(ranks, [out] * 2, meets=_no_memory(call))
    _refused_with(told, "CheckpointError", 3, "rank 1: MemoryError: state: no memory for ")


# ---- loading it ----------------------------------------------------------------------------------


def _fails(place: Any, name: str, failing: int) -> Obstacle:
    return _Failing(place.__name__, name, failing)


class _Failing:
    """A disk error instead of a call, on one rank."""

    def __init__(self, module: str, name: str, rank: int) -> None:
        self._target, self._rank = f"{module}.{name}", rank

    def __call__(self, patch: pytest.MonkeyPatch, rank: int) -> None:
        def fail(*args: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        if rank == self._rank:
            patch.setattr(self._target, fail)


@pytest.mark.parametrize(
    ("place", "name", "failing"),
    [
        (run, "RankZeroReport", 0),
        (build, "initial_network", 1),
        (training_state, "newest_images", 1),
        (training_state, "load_network_state", 1),
        (training_state, "restore_random", 1),
    ],
)
def test_one_rank_cannot_load_it(
    ranks: Ranks, out: Path, place: Any, name: str, failing: int
) -> None:
    told = _told(ranks, [out] * 2, meets=_fails(place, name, failing))
    wanted = f"rank {failing}: OSError: [Errno 5] Input/output error"
    _refused_with(told, "CheckpointError", 3, wanted)


# ---- the command line ----------------------------------------------------------------------------


def test_its_exit_code_is_that_of_every_rank(driver: Driver, saved: Path) -> None:
    """The error is each rank's own, so the watchdog has nothing to add to it."""
    shutil.copytree(saved, driver.out)
    for path in _checkpoints(driver.out):
        (path / "manifest.json").write_text("{}")
    seconds = {f"distributed.{name}timeout_seconds": 600 for name in ("", "startup_")}
    ends = driver(2, Run((), {**SETTINGS_OF_RUN, **seconds}))
    assert [end.exitcode for end in ends] == [3, 3]
    errors = [error for end in ends for error in end.errors]
    assert len(errors) == 1 and "all checkpoints are damaged" in errors[0]
    assert "failed at" not in errors[0]


def test_a_rank_that_is_killed_meanwhile_is_named(driver: Driver, saved: Path) -> None:
    """The other rank's lost connection, met while the ranks are compared, is not the cause."""
    shutil.copytree(saved, driver.out)
    target = "worm_dist.training.run:_run_folder"
    ends = driver(2, Run((Fault.kill(1, 1).at(target),), SETTINGS_OF_RUN))
    assert [end.exitcode for end in ends] == [6, -9]
    assert "rank 1 is gone: killed" in ends[0].said and "could not be" not in ends[0].said


def test_a_reason_is_told_though_a_rank_is_killed_meanwhile(driver: Driver, saved: Path) -> None:
    """It was taken for that of the connection, over which it could not be told."""
    shutil.copytree(saved, driver.out)
    for path in _checkpoints(driver.out):
        (path / "manifest.json").write_text("{}")
    target = "worm_dist.training.run:_run_folder"
    ends = driver(2, Run((Fault.kill(1, 1).at(target),), SETTINGS_OF_RUN))
    assert [end.exitcode for end in ends] == [6, -9]
    assert "all checkpoints are damaged" in ends[0].said
