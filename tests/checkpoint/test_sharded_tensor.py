"""Sharded tensors on disk: any range can be read of what several ranks have written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worm_dist import CheckpointError
from worm_dist.checkpoint.rank_reports import collect, report
from worm_dist.checkpoint.sharded_tensor import (
    LocalShards,
    StoredTensor,
    only_shards,
    with_stored_tensors_read,
)
from worm_dist.checkpoint.state_file import pack, read_part, write_part, write_shards

RANGES = ((0, 5), (5, 5), (5, 11), (11, 24))
"""Of the ranks: of rank one's nothing."""


def _states(full: Tensor, ranges: Any = RANGES) -> list[dict[str, Any]]:
    flat = full.flatten()
    return [
        {
            "moments": {"a.b": LocalShards(full.shape, full.dtype, [(begin, flat[begin:end])])},
            "step": torch.tensor(3.0),
        }
        for begin, end in ranges
    ]


def _written(folder: Path, states: list[dict[str, Any]]) -> Any:
    packed = pack(states[0])
    files = write_part(folder, "run", packed)
    for rank, state in enumerate(states):
        files |= write_shards(folder, "run", rank, pack(only_shards(state)))
    return read_part(folder, "run", files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_any_range_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    full = torch.arange(24).view(2, 3, 4).to(dtype)
    state = _written(tmp_path, _states(full))
    stored = state["moments"]["a.b"]
    assert isinstance(stored, StoredTensor) and state["step"] == 3
    assert (stored.shape, stored.dtype) == (full.shape, dtype)
    for begin in range(25):
        for end in range(begin, 25):
            assert torch.equal(stored.read(begin, end), full.flatten()[begin:end])
    assert torch.equal(with_stored_tensors_read(state)["moments"]["a.b"], full)


def test_elements_that_two_ranks_wrote_are_there_once(tmp_path: Path) -> None:
    full = torch.arange(24.0)
    stored = _written(tmp_path, _states(full, [(0, 10), (0, 10), (8, 24)]))["moments"]["a.b"]
    assert torch.equal(stored.read(), full)


@pytest.mark.parametrize("ranges", [[(0, 10), (11, 24)], [(0, 23)], [(1, 24)]])
def test_missing_elements_are_refused(tmp_path: Path, ranges: Any) -> None:
    with pytest.raises(CheckpointError, match=r"wanted 24 elements, found the first \d+"):
        _written(tmp_path, _states(torch.arange(24.0), ranges))


def test_a_file_of_another_dtype_is_refused(tmp_path: Path) -> None:
    states = _states(torch.arange(24.0), [(0, 10), (10, 24)])
    states[1] = _states(torch.arange(24), [(10, 24)])[0]
    with pytest.raises(CheckpointError, match="wanted float32, found int64"):
        _written(tmp_path, states)


def test_nothing_stays_of_a_part_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank's report would find no room either, and rank zero would wait for it."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (state,) = _states(torch.arange(24.0), [(0, 24)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"run_shard-1\.safetensors: disk full"):
            write_shards(tmp_path, "run", 1, pack(state))
    assert os.listdir(tmp_path) == []


def test_a_rank_that_cannot_write_is_named(tmp_path: Path) -> None:
    report(tmp_path, 1, {}, None)
    report(tmp_path, 2, {}, "disk full")
    with pytest.raises(CheckpointError, match="rank 2: disk full"):
        collect(tmp_path, [1, 2], 5)
    assert not (tmp_path / ".rank-1.json").exists()


def test_a_rank_that_does_not_write_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 1 has not written its part within 0 seconds"):
        collect(tmp_path, [1], 0)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 100)
    with pytest.raises(
        CheckpointError, match=r"\.rank-1\.json: cannot be read: File name too long"
    ):
        collect(folder, [1], 0)
