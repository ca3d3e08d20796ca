"""A whole run under ZeRO stage 3 ends as one under stage 1, also if it is broken off on the way."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.courses import differences_of_runs, last_state, under_zero
from tests.faults.training import train
from tests.ranks import Ranks
from worm_dist import load_ticket
from worm_dist.distributed.graceful_stop import StopCoordinator
from worm_dist.distributed.init import RankInfo

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow("trains runs under DeepSpeed")]

STEP = 7
"""While channels fade, a stage behind."""


def _run(out: Path, stage: int, until: int | None) -> None:
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    os.environ.update(place.torchrun_environment, MASTER_ADDR="localhost", MASTER_PORT="1")
    warnings.simplefilter("ignore")  # of DeepSpeed's, at its import

    def stopped(stop: StopCoordinator) -> None:
        if until is not None:
            stop.stop_at(until)

    train(out, heed=stopped, **{**under_zero(stage), "optimizer.name": "adamw"})


def _call(ranks: Ranks, *arguments: Any) -> None:
    for outcome in ranks.outcomes(2, _run, *arguments, group_timeout=100):
        assert outcome.exitcode == 0, str(outcome)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of stage 1, of stage 3, and of stage 3 broken off and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    ranks = Ranks(folder)
    for name, stage, until in (("1", 1, None), ("3", 3, None), ("again", 3, STEP)):
        _call(ranks, folder / name, stage, until)
    _call(ranks, folder / "again", 3, None)
    return {name: folder / name for name in ("1", "3", "again")}


def test_it_finds_and_trains_the_same_ticket_as_stage_1(runs: dict[str, Path]) -> None:
    weights = [last_state(runs[name])["network"] for name in ("1", "3")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    tickets = [load_ticket(runs[name] / "ticket").state_dict() for name in ("1", "3")]
    for name, weight in tickets[0].items():
        assert torch.equal(weight, tickets[1][name]), name


def test_broken_off_it_ends_the_same(runs: dict[str, Path]) -> None:
    """Except for bytes: after a resume all weights are gathered once more."""
    found = differences_of_runs(runs["3"], runs["again"])
    assert not [line for line in found if "bytes" not in line]
