"""Whole runs of ``train`` whose network is sharded: they end as under DistributedDataParallel, and
a run that is broken off ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.courses import ALL_PHASES, differences_of_runs, journal_of, last_state
from tests.faults.training import train
from tests.ranks import Ranks
from worm_dist import CheckpointError, load_ticket
from worm_dist.backends import network_state
from worm_dist.distributed.graceful_stop import StopCoordinator
from worm_dist.errors import ConfigError

pytestmark = [pytest.mark.slow("trains four runs")]

STEP = 7
"""While channels fade, a stage behind."""
SHARDED: dict[str, Any] = {"distributed.backend": "fsdp", "distributed.bucket_cap_mb": 0.001}
"""Convolutions are sharded by themselves."""


def _run(out: Path, backend: dict[str, Any], until: int | None) -> None:
    def stopped(stop: StopCoordinator) -> None:
        if until is not None:
            stop.stop_at(until)

    train(out, heed=stopped, **{**ALL_PHASES, "optimizer.name": "adamw", **backend})


def _writers(out: Path) -> set[str]:
    """The ranks that have written shards."""
    names = [path.stem for path in out.glob("checkpoints/*/*_shard-*")]
    return {name.rpartition("-")[2] for name in names}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Under DistributedDataParallel; sharded; and sharded, broken off and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    ranks = Ranks(folder)
    calls: list[tuple[str, dict[str, Any], int | None]] = [
        ("dense", {}, None),
        ("sharded", SHARDED, None),
        ("again", SHARDED, STEP),
        ("again", SHARDED, None),
    ]
    for name, backend, until in calls:
        call = (_run, folder / name, backend, until)
        for outcome in ranks.outcomes(2, *call, group_timeout=100):
            assert outcome.exitcode == 0, str(outcome)
    return {name: folder / name for name in ("dense", "sharded", "again")}


def test_it_decides_as_under_ddp(runs: dict[str, Path]) -> None:
    """The penalty is added after the average instead of before, so weights are rounded
    differently."""
    tickets = [load_ticket(runs[name] / "ticket").state_dict() for name in ("dense", "sharded")]
    assert tickets[0].keys() == tickets[1].keys()
    for name, weight in tickets[0].items():
        torch.testing.assert_close(weight, tickets[1][name], rtol=1e-3, atol=1e-4, msg=name)
    journals = [
        [line.partition('"mask_digest"')[2] for line in journal_of(runs[name])]
        for name in ("dense", "sharded")
    ]
    assert journals[0] == journals[1] and any(journals[0])


def test_broken_off_it_ends_the_same(runs: dict[str, Path]) -> None:
    found = list(differences_of_runs(runs["sharded"], runs["again"]))
    assert not found, "\n".join(found[:20])


def test_each_rank_saves_its_shards(runs: dict[str, Path]) -> None:
    assert (_writers(runs["sharded"]), _writers(runs["dense"])) == ({"0", "1"}, set())
    sharded, dense = (last_state(runs[name])["network"] for name in ("sharded", "dense"))
    assert sharded.keys() == dense.keys()


def _refused(out: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        train(out, **SHARDED)
    return str(caught.value)


def test_one_rank_has_nothing_to_share(ranks: Ranks, tmp_path: Path) -> None:
    (message,) = ranks(1, _refused, tmp_path / "run")
    assert message.startswith("distributed.backend: fsdp shards the network over")


def _resumed_without_its_files(out: Path) -> None:
    def unreadable(*unused: Any) -> Any:
        raise CheckpointError("disk gone")

    if dist.get_rank() == 1:
        vars(network_state)["_range"] = unreadable
    _run(out, SHARDED, None)


def test_a_rank_that_cannot_read_its_weights_stops_all(tmp_path: Path) -> None:
    ranks, out = Ranks(tmp_path), tmp_path / "run"
    for outcome in ranks.outcomes(2, _run, out, SHARDED, 2):
        assert outcome.exitcode == 0, str(outcome)
    for outcome in ranks.outcomes(2, _resumed_without_its_files, out, group_timeout=30):
        assert (outcome.error, outcome.text) == ("CheckpointError", "rank 1: disk gone")
