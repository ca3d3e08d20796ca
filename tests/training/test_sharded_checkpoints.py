"""Under ZeRO every rank writes its shards to a checkpoint and reads them, if all see the disk."""

from __future__ import annotations

import os
import shutil
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
pytestmark = [pytest.mark.slow("trains runs under DeepSpeed")]

STEP = 7
"""While channels fade, a stage behind."""
WAYS = ((True, True), (True, False), (False, True))
"""Whether all ranks see the disk when the run is broken off, and when it goes on."""


def _run(out: Path, until: int | None, sees_disk: bool = True) -> dict[str, int]:
    """Train to a step, or to the end; the elements that this rank has read, by tensor."""
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    os.environ.update(place.torchrun_environment, MASTER_ADDR="localhost", MASTER_PORT="1")
    warnings.simplefilter("ignore")  # of DeepSpeed's, at its import
    read: dict[str, int] = {}
    real = StoredTensor.read

    def seen(self: StoredTensor, begin: int = 0, end: int | None = None) -> Any:
        elements = real(self, begin, end)
        read[self.name] = read.get(self.name, 0) + elements.numel()
        return elements

    def stopped(stop: StopCoordinator) -> None:
        if until is not None:
            stop.stop_at(until)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredTensor, "read", seen)
        if not sees_disk and dist.get_rank() == 1:
            patch.setattr(checkpointer, "is_held", lambda *_: False)
            patch.setattr(share_state, "manifest_digest", lambda *_: "another disk's")
        train(out, heed=stopped, **{**under_zero(1), "optimizer.name": "adamw"})
    return read


def _runs(folder: Path) -> list[dict[str, int]]:
    """One run to its end, one broken off in each way, and copies of these as they were then."""
    _run(folder / "unbroken", None)
    read = []
    for number, (writes, reads) in enumerate(WAYS):
        out = folder / str(number)
        _run(out, STEP, writes)
        if dist.get_rank() == 0:
            shutil.copytree(out, folder / f"{number} then")
        dist.barrier()
        read.append(_run(out, None, reads))
    return read


def _call(ranks: Ranks, size: int, function: Any, *arguments: Any) -> list[Any]:
    outcomes = ranks.outcomes(size, function, *arguments, group_timeout=100)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return [outcome.value for outcome in outcomes]


def _shards(out: Path) -> set[str]:
    newest = CheckpointManager(out / "checkpoints").newest()
    assert newest is not None
    return {path.name for path in newest.path.glob("*_shard-*")}


def _sharded(out: Path) -> dict[str, int]:
    """Number of elements of every tensor that is sharded in the newest checkpoint."""
    newest = CheckpointManager(out / "checkpoints").newest()
    assert newest is not None
    parameters = newest.read("run")["optimizer"]["parameters"].values()
    tensors = [tensor for state in parameters for tensor in state["moments"].values()]
    return {t.name: t.shape.numel() for t in tensors if isinstance(t, StoredTensor)}


def test_a_run_goes_on_whoever_writes_and_reads(ranks: Ranks, tmp_path: Path) -> None:
    zero, one = _call(ranks, 2, _runs, tmp_path)
    for number, (writes, reads) in enumerate(WAYS):
        out, then = tmp_path / str(number), tmp_path / f"{number} then"
        assert not list(differences_of_runs(tmp_path / "unbroken", out)), (writes, reads)
        assert len(_shards(then)) == 2 * writes
        assert bool(one[number]) == (writes and reads)
        if reads:
            both = zero[number].keys() | one[number].keys()
            found = {n: zero[number].get(n, 0) + one[number].get(n, 0) for n in both}
            assert found == _sharded(then), "each element is read once"
    # Another number of ranks.
    then = tmp_path / "0 then"
    sharded = _sharded(then)
    assert _call(ranks, 1, _run, then, STEP + 2) == [sharded]
    assert _shards(then) == {"run_shard-0.safetensors"}
