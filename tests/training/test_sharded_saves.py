"""A save that all ranks take part in: complete, or not there and with the reason on every rank."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.ranks import Ranks
from worm_dist import CheckpointError
from worm_dist.checkpoint.lock import run_lock
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.sharded_tensor import LocalShards
from worm_dist.checkpoint.staging import Staged
from worm_dist.training.checkpointer import Checkpointer
from worm_dist.training.reporting.failed_writes import FailedWrites
from worm_dist.training.run_config import RunConfig


def _fail(*_: Any) -> Any:
    raise CheckpointError("disk full")


def _saved(folder: Path, failing: int | None, method: str) -> str:
    """The error of two saves; a method fails on a rank in the first one."""
    rank, said = dist.get_rank(), "nothing"
    with run_lock(folder) if rank == 0 else nullcontext() as lease:
        dist.barrier()
        checkpointer = Checkpointer(folder, RunConfig(), FailedWrites(), lease)
        assert checkpointer.is_on_shared_disk
        shards = LocalShards(torch.Size([15]), torch.float32, [(5 * rank, torch.ones(5))])
        state = {"optimizer": {"a": shards}, "step": torch.tensor(1)}
        for step in (3, 4):
            real = getattr(Staged, method)
            if rank == failing and step == 3:
                setattr(Staged, method, _fail)
            checkpointer.save(state, step, "search", None)
            try:
                checkpointer.finish()
            except CheckpointError as error:
                said = str(error)
            setattr(Staged, method, real)
        dist.barrier()
    return said


def _left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def test_every_rank_writes_its_part(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(3, _saved, tmp_path, None, "write") == ["nothing"] * 3
    assert _left(tmp_path) == ["step-3", "step-4"]
    newest = CheckpointManager(tmp_path / "checkpoints").newest()
    assert newest is not None and newest.parts == ["run", "settings"]
    shards = {f"run_shard-{rank}.safetensors" for rank in range(3)}
    assert shards < newest.manifest.files.keys()
    assert torch.equal(newest.read("run")["optimizer"]["a"].read(), torch.ones(15))


def _assert_undone(said: list[str], folder: Path, reason: str) -> None:
    assert all(reason in each for each in said)
    assert _left(folder) == ["step-4"]


def test_a_rank_that_cannot_write_is_named_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    said = ranks(2, _saved, tmp_path, 1, "write_shards")
    _assert_undone(said, tmp_path, "rank 1: disk full")


def test_rank_zero_cannot_write(ranks: Ranks, tmp_path: Path) -> None:
    """Its folder is removed once the others have written to it."""
    _assert_undone(ranks(2, _saved, tmp_path, 0, "write"), tmp_path, "disk full")


def test_rank_zero_cannot_create_the_folder(ranks: Ranks, tmp_path: Path) -> None:
    _assert_undone(ranks(2, _saved, tmp_path, 0, "create"), tmp_path, "disk full")
