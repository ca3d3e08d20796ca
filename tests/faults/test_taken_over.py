"""A run whose folder another run has taken over."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.driver import Driver, Fault, Run
from worm_dist.checkpoint import lease
from worm_dist.checkpoint.lease import Holder
from worm_dist.training.trainer import Trainer

pytestmark = pytest.mark.slow("begins two runs of two ranks")

SAVE = "worm_dist.training.trainer:Trainer._save"


def _take_over(real: Any, trainer: Trainer, *args: Any) -> Any:
    """As another run does after a long suspension of this one."""
    lease.LEASE_SECONDS = 0.0
    path = trainer._report._folder / "run.lock"  # type: ignore[attr-defined]
    path.unlink()
    path.write_bytes(Holder.this_process(None, {}).after(0))
    return real(trainer, *args)


@pytest.mark.fault(32, "a run that was taken over stops on all ranks, and writes no more")
@pytest.mark.parametrize(
    ("fault", "every", "saved"),
    [
        (Fault.do(_take_over, rank=0, step=6), "100ba", []),
        (Fault.do(_take_over, rank=0, step=3).at(SAVE), "1ba", ["step-1", "step-2"]),
    ],
    ids=["in a step", "before a save"],
)
def test_a_run_that_was_taken_over_stops(
    driver: Driver, fault: Fault, every: str, saved: list[str]
) -> None:
    """Both went on to write the same files."""
    ends = driver(2, Run((fault,), {"checkpoint.every": every}))
    assert [end.exitcode for end in ends] == [2, 2]
    assert "run.lock: another run has taken this directory over: process " in ends[0].errors[0]
    assert "epoch 1/2" not in ends[0].printed, "it stops before the epoch's end"
    assert sorted(path.name for path in driver.out.glob("checkpoints/*")) == saved
    assert (driver.out / "run.lock").exists() and not (driver.out / "result.json").exists()
