"""Ranks that change between two attempts, on hosts that share no disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.faults.courses import ALL_PHASES, last_state
from tests.faults.training import train
from tests.ranks import Ranks
from tests.resuming import differences
from worm_dist.checkpoint.manager import CheckpointManager

pytestmark = pytest.mark.slow("trains whole runs")

_KEPT: dict[str, Any] = {**ALL_PHASES, "checkpoint.every": "1ba", "checkpoint.keep_last": 100}


def _steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def _until(step: int, whole: Path, run: Path) -> None:
    """Let a host's folder be that of the same run, killed after this step."""
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("result.json", "ticket", "run.lock"))
    CheckpointManager(run / "checkpoints").rewind(step)


def _resumed(folder: Path, cases: dict[str, tuple[int, int]]) -> dict[str, list[int]]:
    """Steps that rank zero has saved, by case: the steps up to which each host has checkpoints."""
    rank, whole, found = dist.get_rank(), folder / "whole", {}
    train(whole, **_KEPT)
    for case, of_hosts in cases.items():
        run = folder / case / f"host-{rank}"
        if of_hosts[rank]:
            _until(of_hosts[rank], whole, run)
        dist.barrier()
        train(run, **_KEPT)
        found[case] = _steps(folder / case / "host-0")
    return found


@pytest.mark.fault(1, "on hosts without a shared disk, whichever has the newest checkpoint")
def test_the_newest_checkpoint_is_taken_from_the_host_that_has_it(
    ranks: Ranks, tmp_path: Path
) -> None:
    """A new host became rank zero's; its empty disk made the run begin anew."""
    cases = {"new": (0, 5), "older": (3, 13), "newer": (13, 3)}
    outcomes = ranks.outcomes(2, _resumed, tmp_path, cases)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    saved = outcomes[0].value
    assert saved["new"] == list(range(6, 25))
    assert saved["older"] == [1, 2, 3, *range(14, 25)]
    assert saved["newer"] == list(range(1, 25))
    whole = last_state(tmp_path / "whole")
    for case in cases:
        state = last_state(tmp_path / case / "host-0")
        state["report"] = whole["report"]  # the journal's length: its beginning is elsewhere
        assert not list(differences(whole, state, case))


def _not_resumed(folder: Path) -> dict[str, list[int]]:
    """The same, where what another host has is no unfinished run with these settings."""
    rank, whole, found = dist.get_rank(), folder / "whole", {}
    settings: dict[str, Any] = {"checkpoint.keep_last": 100, "checkpoint.every": "4ba"}
    train(whole, **settings)
    for case in ("finished", "others", "never"):
        run = folder / case / f"host-{rank}"
        if rank == 1:
            shutil.copytree(whole, run)
            if case != "finished":
                (run / "result.json").unlink()
        dist.barrier()
        seed: dict[str, Any] = {"seed": 1} if case == "others" else {}
        train(run, "never" if case == "never" else "auto", **settings, **seed)
        found[case] = _steps(folder / case / "host-0")
    return found


def test_what_is_no_unfinished_run_is_left_where_it_is(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks.outcomes(2, _not_resumed, tmp_path):
        assert outcome.exitcode == 0, str(outcome)
        assert set(map(tuple, outcome.value.values())) == {(4, 8, 12, 16)}
