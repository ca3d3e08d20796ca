"""Under ``fully_shard`` every rank writes its rows, and another number of ranks reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

import worm_dist
from tests.checkpoint.states import info
from tests.nets import Residual, random_images
from tests.ranks import Ranks
from tests.resuming import differences
from worm_dist.backends.network_state import full_network_state, load_network_state, network_state
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.sharded_tensor import only_shards
from worm_dist.checkpoint.staging import Staged
from worm_dist.checkpoint.state_file import pack
from worm_dist.distributed.collectives import ProcessGroupComm


def _engine(seed: int) -> worm_dist.Engine:
    torch.manual_seed(seed)
    network = Residual()
    fully_shard(network)
    optimizer = AdamW(network.parameters(), lr=0.01)
    return worm_dist.attach(
        network, optimizer, worm_dist.WormConfig(), example_inputs=random_images(1)
    )


def _everything(engine: worm_dist.Engine) -> Any:
    """All of network and optimizer, on rank zero."""
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, torch.device("cpu"))
    network = full_network_state(network_state(engine.model), comm)
    optimizer = engine.optimizer_state()
    return (network, optimizer) if comm.rank == 0 else None


def _write(folder: Path) -> tuple[Any, int]:
    """What the ranks have; and the bytes of tensors that this rank has written."""
    engine, rank = _engine(0), dist.get_rank()
    for number in range(2):
        engine.model(random_images(4, seed=number + 10 * rank)).square().mean().backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    state = {
        "network": network_state(engine.model),
        "optimizer": engine.optimizer_state(sharded=True),
    }
    manager = CheckpointManager(folder)
    names = [manager.stage(7).path.name if rank == 0 else ""]
    dist.broadcast_object_list(names)
    staged = Staged(folder / names[0])
    packed = pack(state if rank == 0 else only_shards(state))
    files = staged.write_shards("run", rank, packed)
    if rank == 0:
        files |= staged.write("run", packed)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, files)
    if rank == 0:
        manager.commit(staged, info(7), {n: d for each in found for n, d in each.items()})
    assert packed.shards is not None
    written = sum(memory.numel() for _, memory in packed.shards.values())
    return _everything(engine), written


def _read(path: Path) -> Any:
    engine = _engine(1)
    state = Checkpoint(path).read("run")
    load_network_state(engine.model, state["network"])
    engine.load_optimizer_state(state["optimizer"])
    return _everything(engine)


def test_another_number_of_ranks_reads_what_each_has_written(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks(3, _write, tmp_path)
    (everything, _), *_ = outcomes
    again, _ = ranks(2, _read, tmp_path / "step-7")
    assert not list(differences(everything, again, "all"))
    # Weights and two moments, each element once, about as many on every rank.
    parameters = sum(p.numel() for p in Residual().parameters())
    assert sum(written for _, written in outcomes) == 12 * parameters
    CheckpointManager.open(tmp_path / "step-7")
