"""Only rank zero reads a checkpoint; the others are sent what they need of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.states import info
from tests.faults.training import train
from tests.ranks import Ranks
from tests.resuming import differences
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.sharded_tensor import LocalShards
from worm_dist.checkpoint.state_file import pack
from worm_dist.distributed import byte_streams
from worm_dist.training.share_state import share_state

CPU = torch.device("cpu")


def _own(rank: int) -> dict[str, Any]:
    """Of another size on every rank; nothing of tensors on rank zero."""
    memory = [torch.arange(7.0) + rank + number for number in range(3 * rank)]
    return {"random": (3, (rank, None)), "losses": [0.1 * rank, 2.0], "memory": memory}


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weights = torch.randn(301)
    return {
        "format": 4,
        "network": {"a": weights, "tied": weights, "b": images, "steps": torch.tensor(7)},
        "optimizer": {0: [torch.empty(0), torch.randn(33).bfloat16()], "infinite": float("inf")},
        "flags": torch.tensor([True, False]),
        "ranks": [_own(rank) for rank in range(3)],
    }


def _share(piece_bytes: int) -> list[str]:
    """What differs from what this rank should have."""
    byte_streams.PIECE_BYTES = piece_bytes
    rank = dist.get_rank()
    state = share_state(_state() if rank == 0 else None, CPU)
    wanted = _state()
    del wanted["ranks"]
    assert state is not None
    assert state["network"]["a"] is state["network"]["tied"]
    assert state["network"]["b"].stride() == wanted["network"]["b"].stride()
    return list(differences(state, {**wanted, "rank": _own(rank)}, "the state"))


@pytest.mark.parametrize("piece_bytes", [1 << 20, 100])
def test_all_ranks_have_the_same_state_and_each_its_own(ranks: Ranks, piece_bytes: int) -> None:
    """In one piece, and in pieces that end within tensors and hold several."""
    assert ranks(3, _share, piece_bytes) == [[]] * 3


def _share_nothing() -> Any:
    return share_state(None, CPU)


def test_a_new_run_has_none(ranks: Ranks) -> None:
    assert ranks(2, _share_nothing) == [None, None]


def _share_malformed() -> Any:
    malformed = {"format": 4, "ranks": [{"losses": [0.0, 0.0]}]}
    return share_state(malformed if dist.get_rank() == 0 else None, CPU)


def test_malformed_states_of_ranks_are_refused(ranks: Ranks) -> None:
    """Rank zero said so, and the other one waited for it."""
    for refused in ranks.outcomes(2, _share_malformed, group_timeout=600, idle_limit=20):
        assert refused.error == "CheckpointError", str(refused)
        assert refused.text.startswith("rank 0: --resume: the states of the ranks in the ")
        assert refused.text.endswith("are malformed: KeyError('engine')")


def _share_shards_that_are_gone(folder: Path) -> Any:
    """Rank one does not see the disk, so rank zero has to send what it can no longer read."""
    rank, state = dist.get_rank(), None
    if rank == 0:
        shards = LocalShards(torch.Size([4]), torch.float32, [(0, torch.ones(4))])
        packed = pack({"a": shards})
        staged = CheckpointManager(folder).stage(3)
        files = {**staged.write("run", packed), **staged.write_shards("run", 0, packed)}
        path = staged.commit(info(3), files)
        state = {**Checkpoint(path).read("run"), "ranks": [_own(number) for number in range(2)]}
        (path / "run_shard-0.safetensors").unlink()
    return share_state(state, CPU, path=folder / "step-3" if rank == 0 else None)


def test_shards_that_cannot_be_sent_are_told_to_all(ranks: Ranks, tmp_path: Path) -> None:
    call = 2, _share_shards_that_are_gone, tmp_path
    for refused in ranks.outcomes(*call, group_timeout=600, idle_limit=20):
        assert refused.error == "CheckpointError", str(refused)
        wanted = f"rank 0: {tmp_path}/step-3/run_shard-0.safetensors: wanted this file, found none"
        assert refused.text == wanted


def _break_off(out: Path) -> None:
    train(out, heed=lambda stop: stop.stop_at(3))


def _go_on(out: Path) -> set[str]:
    """What this rank has opened in the folder."""
    opened = set()

    def note(event: str, arguments: Any) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(str(out)):
            opened.add(Path(arguments[0]).name)

    sys.addaudithook(note)
    train(out)
    return opened


def test_a_rank_on_a_host_without_the_checkpoint_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    """Every rank opened rank zero's path: on hosts with disks of their own, a restart failed."""
    out = tmp_path / "run"
    ranks(2, _break_off, out)
    assert (out / "checkpoints" / "step-3").exists() and not (out / "result.json").exists()
    zero, other = ranks(2, _go_on, out)
    assert "run.safetensors" in zero and other <= {"run.lock"}
    assert (out / "result.json").exists()
