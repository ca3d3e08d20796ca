"""Under ZeRO every rank writes its shards to a checkpoint and reads them, if all see the disk."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.faults.courses import differences_of_runs, under_zero
from tests.faults.training import train
from tests.ranks import Ranks
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.sharded_tensor import StoredTensor
from worm_dist.distributed.graceful_stop import StopCoordinator
from worm_dist.distributed.init import RankInfo
from worm_dist.training import checkpointer, share_state

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow("trains runs under DeepSpeed"), pytest.mark.timeout(300)]

STEP = 7
"""While channels fade, a stage behind."""


def _run(out: Path, until: int | None, has_disk: bool) -> dict[str, int]:
    """Train to a step, or to the end; the elements that this rank has read, by tensor."""
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    os.environ.update(place.torchrun_environment, MASTER_ADDR="localhost", MASTER_PORT="1")
    warnings.simplefilter("ignore")  # of DeepSpeed's, at its import
    if not has_disk and dist.get_rank() == 1:
        vars(checkpointer)["is_held"] = lambda *_: False
        vars(share_state)["manifest_digest"] = lambda *_: "another disk's"
    read: dict[str, int] = {}
    real = StoredTensor.read

    def seen(self: StoredTensor, begin: int = 0, end: int | None = None) -> Any:
        elements = real(self, begin, end)
        read[self.name] = read.get(self.name, 0) + elements.numel()
        return elements

    StoredTensor.read = seen  # type: ignore[method-assign]

    def stopped(stop: StopCoordinator) -> None:
        if until is not None:
            stop.stop_at(until)

    train(out, heed=stopped, **{**under_zero(1), "optimizer.name": "adamw"})
    return read


def _files(out: Path) -> set[str]:
    newest = CheckpointManager(out / "checkpoints").newest()
    assert newest is not None
    return {path.name for path in newest.path.iterdir()}


def _sharded(out: Path) -> dict[str, int]:
    """Number of elements of every tensor that is sharded in the newest checkpoint."""
    newest = CheckpointManager(out / "checkpoints").newest()
    assert newest is not None
    parameters = newest.read("run")["optimizer"]["parameters"].values()
    tensors = [tensor for state in parameters for tensor in state["moments"].values()]
    return {t.name: t.shape.numel() for t in tensors if isinstance(t, StoredTensor)}


def _call(ranks: Ranks, size: int, *arguments: Any) -> list[dict[str, int]]:
    outcomes = ranks.outcomes(size, _run, *arguments, group_timeout=100, wall_limit=140)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return [outcome.value for outcome in outcomes]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    _call(Ranks(folder), 2, folder / "run", None, True)
    return folder / "run"


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_run_goes_on_whoever_writes_and_reads(
    ranks: Ranks, tmp_path: Path, unbroken: Path, writes: bool, reads: bool
) -> None:
    out = tmp_path / "run"
    _call(ranks, 2, out, STEP, writes)
    shards = {f"run_shard-{rank}.safetensors" for rank in range(2)}
    assert (_files(out) & shards) == (shards if writes else set())
    sharded = _sharded(out)
    zero, one = _call(ranks, 2, out, None, reads)
    if writes and reads:
        assert {n: zero.get(n, 0) + one.get(n, 0) for n in zero | one} == sharded
    assert not list(differences_of_runs(unbroken, out))


def test_another_number_of_ranks_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _call(ranks, 2, out, STEP, True)
    sharded = _sharded(out)
    assert _call(ranks, 1, out, STEP + 2, True) == [sharded]
    assert "run_shard-0.safetensors" in _files(out)
    assert "run_shard-1.safetensors" not in _files(out)
