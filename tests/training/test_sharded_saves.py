"""A save that all ranks take part in: complete, or not there and with the reason on every rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks
from worm_dist import CheckpointError
from worm_dist.checkpoint import checkpoint
from worm_dist.checkpoint.durable_io import FileDigest
from worm_dist.checkpoint.lock import run_lock
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.sharded_tensor import LocalShards, is_shard
from worm_dist.checkpoint.staging import Staged
from worm_dist.distributed.init import RankInfo
from worm_dist.training import checkpointer as module
from worm_dist.training import shared_verification
from worm_dist.training.checkpointer import Checkpointer
from worm_dist.training.newest_checkpoint import newest_checkpoint
from worm_dist.training.reporting.failed_writes import FailedWrites
from worm_dist.training.run_config import RunConfig
from worm_dist.training.run_folder import open_run_folder


def _fail(*_: Any) -> Any:
    raise CheckpointError("disk full")


def _saved(folder: Path, failing: int | None, method: str) -> str:
    """The error of two saves; a method fails on a rank in the first one."""
    said, _ = _saved_under(folder, failing, Staged, method, RunConfig())
    return said


def _without_its_report(folder: Path, on_error: str) -> tuple[str, str]:
    """The error of two saves, and the failed writes; rank one cannot report the first one."""
    settings = {"distributed": {"timeout_seconds": 1}, "checkpoint": {"on_error": on_error}}
    config = RunConfig.model_validate(settings)
    return _saved_under(folder, 1, module, "report", config)


def _saved_under(
    folder: Path, failing: int | None, place: Any, method: str, config: RunConfig
) -> tuple[str, str]:
    rank, said, failed_writes = dist.get_rank(), "nothing", FailedWrites()
    with run_lock(folder) if rank == 0 else nullcontext() as lease:
        dist.barrier()
        checkpointer = Checkpointer(folder, config, failed_writes, lease)
        assert checkpointer.is_on_shared_disk
        shards = LocalShards(torch.Size([15]), torch.float32, [(5 * rank, torch.ones(5))])
        state = {"optimizer": {"a": shards}, "step": torch.tensor(1)}
        for step in (3, 4):
            real = getattr(place, method)
            if rank == failing and step == 3:
                setattr(place, method, _fail)
            checkpointer.save(state, step, "search", None)
            try:
                checkpointer.finish()
            except CheckpointError as error:
                said = str(error)
            setattr(place, method, real)
        dist.barrier()
    return said, str(failed_writes)


def _left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def test_every_rank_writes_its_part(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(3, _saved, tmp_path, None, "write") == ["nothing"] * 3
    assert _left(tmp_path) == ["step-3", "step-4"]
    newest = CheckpointManager(tmp_path / "checkpoints").newest()
    assert newest is not None and newest.parts == ["run", "settings"]
    shards = {f"run_shard-{rank}.safetensors" for rank in range(3)}
    assert shards < newest.manifest.files.keys()
    assert newest.manifest.format_version == 3, "versions that do not read shards refuse it"
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


def test_a_rank_cannot_even_report(ranks: Ranks, tmp_path: Path) -> None:
    """Rank zero waits for the report no longer than half of the timeout, and discards the
    checkpoint; it is not tried again, and the next one is saved as ever."""
    reason = "rank 1 has not written its part within 0.5 seconds"
    stopped, goes_on = tmp_path / "stop", tmp_path / "continue"
    said = [error for error, _ in ranks(2, _without_its_report, stopped, "stop")]
    _assert_undone(said, stopped, reason)
    (said_first, failed), (said_second, _) = ranks(2, _without_its_report, goes_on, "continue")
    assert said_first == said_second == "nothing"
    assert failed.startswith("checkpoints: ") and failed.endswith(reason)
    assert _left(goes_on) == ["step-4"]


def _resumed(
    folder: Path, resume: str = "auto", environment: Mapping[str, str] = os.environ
) -> tuple[int | None, set[str]]:
    """The step that this rank would read the state of, and the shards that it has verified."""
    rank, hashed = dist.get_rank(), set()
    real = vars(checkpoint)["open_verified"]

    def seen(path: Path, digest: FileDigest) -> Any:
        if is_shard(path.name):
            hashed.add(f"{path.parent.name}/{path.name}")
        return real(path, digest)

    size = dist.get_world_size()
    config, place = RunConfig(), RankInfo(rank, size, rank, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "open_verified", seen)
        with (
            open_run_folder(folder, resume, config, size, environment)
            if rank == 0
            else nullcontext()
        ) as opened:
            _, chosen = newest_checkpoint(folder, opened, config, place, torch.device("cpu"))
            dist.barrier()
    return None if chosen is None else chosen.step, hashed


def test_shards_are_verified_by_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Rank zero hashed all shards while the others waited.  Each rank hashes a part of them; if any
    is damaged, the checkpoint before is chosen, as it is for any other file."""
    ranks(3, _saved, tmp_path, None, "write")
    (tmp_path / "journal.jsonl").touch()
    names = [f"run_shard-{rank}.safetensors" for rank in range(3)]
    found = ranks(3, _resumed, tmp_path)
    assert found == [(4, {f"step-4/{names[0]}"}), *((None, {f"step-4/{n}"}) for n in names[1:])]
    _damage(tmp_path / "checkpoints" / "step-4" / names[1])
    (step, _), *others = ranks(3, _resumed, tmp_path)
    assert step == 3
    assert all(len(hashed) == 2 for _, hashed in others), "of both checkpoints"
    _damage(tmp_path / "checkpoints" / "step-3" / names[2])
    for outcome in ranks.outcomes(3, _resumed, tmp_path, group_timeout=600, idle_limit=20):
        assert outcome.error == "CheckpointError", str(outcome)
        assert "rank 0: " in outcome.text
        assert "all checkpoints are damaged: step-3, step-4" in outcome.text


def _started_again_anew(folder: Path) -> tuple[int | None, set[str]]:
    """By a launcher, which repeats ``--resume never``."""
    return _resumed(folder, "never", {"TORCHELASTIC_RESTART_COUNT": "1"})


def test_never_begins_anew_once_all_shards_are_damaged(ranks: Ranks, tmp_path: Path) -> None:
    """It ended in "all checkpoints are damaged ... start anew with --resume never", as if the run
    had not been started so.  Other damaged files are put aside then."""
    out = tmp_path / "run"
    out.mkdir()
    ranks(2, _saved, out, None, "write")
    (out / "journal.jsonl").touch()
    _damage(out / "checkpoints" / "step-4" / "run_shard-1.safetensors")
    assert [step for step, _ in ranks(2, _started_again_anew, out)] == [3, None]
    _damage(out / "checkpoints" / "step-3" / "run_shard-0.safetensors")
    assert [step for step, _ in ranks(2, _started_again_anew, out)] == [None, None]
    (aside,) = tmp_path.glob("run.*")
    assert _left(aside) == ["step-3", "step-4"]
    assert (out / "journal.jsonl").exists() and not (out / "checkpoints").exists()


def _chosen_without_its_manifest(folder: Path) -> tuple[int | None, set[str]]:
    """Rank zero has chosen the checkpoint, and then cannot read its manifest any more."""

    def gone(path: Path) -> str:
        raise CheckpointError(f"{path}: gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_verification, "manifest_digest", gone)
        return _resumed(folder)


def test_a_manifest_that_is_gone_is_told_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _saved, tmp_path, None, "write")
    (tmp_path / "journal.jsonl").touch()
    call = 2, _chosen_without_its_manifest, tmp_path
    for outcome in ranks.outcomes(*call, group_timeout=600, idle_limit=20):
        assert outcome.error == "CheckpointError", str(outcome)
        assert outcome.text == f"rank 0: {tmp_path / 'checkpoints' / 'step-4'}: gone"


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
