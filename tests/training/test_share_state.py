"""Only rank zero reads a checkpoint; the others are sent what they need of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.training import train
from tests.ranks import Ranks
from tests.resuming import differences
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
    refused = ranks.outcomes(2, _share_malformed, group_timeout=2)[0]
    assert refused.error == "CheckpointError" and "malformed: KeyError('engine')" in refused.text


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
