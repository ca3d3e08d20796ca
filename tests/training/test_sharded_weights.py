"""Weights from a checkpoint that several ranks have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoint.states import info
from worm_dist import CheckpointError
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.sharded_tensor import LocalShards, only_shards
from worm_dist.checkpoint.state_file import pack
from worm_dist.training.weights import load_weights


def _checkpoint(folder: Path, weight: torch.Tensor) -> Path:
    """Two ranks have half of the weight each."""
    flat = weight.flatten()
    shards = [LocalShards(weight.shape, weight.dtype, [(at, flat[at : at + 4])]) for at in (0, 4)]
    states = [{"network": {"weight": each, "bias": torch.ones(2)}} for each in shards]
    manager = CheckpointManager(folder)
    staged = manager.stage(1)
    files = staged.write("run", pack(states[0]))
    for rank, state in enumerate(states):
        files |= staged.write_shards("run", rank, pack(only_shards(state)))
    return manager.commit(staged, info(1), files)


def test_full_weights_are_read(tmp_path: Path) -> None:
    weight, network = torch.arange(8.0).view(2, 4), nn.Linear(4, 2)
    load_weights(network, _checkpoint(tmp_path, weight), "model.weights")
    assert torch.equal(network.weight, weight)


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, torch.arange(8.0).view(2, 4))
    file = path / "run_shard-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of the last weight
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run_shard-1\.safetensors: wanted sha256"):
        load_weights(nn.Linear(4, 2), path, "model.weights")
