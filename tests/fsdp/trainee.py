"""Trainee: a network under ``fully_shard``, or under DistributedDataParallel, as users train it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import worm_dist
from tests.fsdp.row import Row
from tests.nets import random_images, randomise
from worm_dist import WormConfig

__all__ = ["Trainee", "full", "network_of", "sharded"]


def network_of(row: Row) -> nn.Module:
    """The same bits every time, on every rank."""
    torch.manual_seed(0)
    network = row.network()
    randomise(network, seed=3)
    for name in row.checkpointed:
        setattr(network, name, checkpoint_wrapper(getattr(network, name)))
    return network


def sharded(row: Row, network: nn.Module, backend: Callable[..., Any]) -> Any:
    """The same network, sharded.

    Args:
        backend: torch.compile's, if the row compiles.
    """
    names = ("replicas", "shards")[-len(row.mesh) :]
    arguments: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", row.mesh, mesh_dim_names=names),
        "reshard_after_forward": row.reshard,
        "mp_policy": MixedPrecisionPolicy(row.param_dtype, row.reduce_dtype),
    }
    for name in row.units:
        if row.compiled == "units":
            network.get_submodule(name).compile(backend=backend)
        fully_shard(network.get_submodule(name), **arguments)
    fully_shard(network, **arguments)
    if row.compiled == "network":
        network.compile(backend=backend)
    return torch.compile(network, backend=backend) if row.compiled == "around" else network


def full(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor.  Collective if it is sharded."""
    whole: Any = tensor
    if isinstance(tensor, DTensor):
        whole = whole.full_tensor()
    copy: Tensor = whole.detach().clone()
    return copy


class Trainee:
    """The same bits for every trainee of a row, on every rank."""

    def __init__(self, row: Row, config: WormConfig, is_sharded: bool = True) -> None:
        self._row = row
        self.network = network_of(row)
        if row.compiled:
            torch._dynamo.reset()
            warnings.simplefilter("ignore")  # torch.compile warns of what it does itself
        self._compiler = CompileCounterWithBackend("aot_eager")
        self.model: Any = (
            sharded(row, self.network, self._compiler)
            if is_sharded
            else DistributedDataParallel(self.network)
        )
        self.optimizer = row.optimizer(self.network)
        self.engine = worm_dist.attach(
            self.model, self.optimizer, config, example_inputs=random_images(1)
        )

    @property
    def num_compiled(self) -> int:
        """Number of graphs that have been compiled so far."""
        num: int = self._compiler.frame_count
        return num

    def step(self, number: int) -> None:
        row = self._row
        model: Any = self.engine.model
        self.optimizer.zero_grad()
        for micro in range(row.passes):
            is_last = micro == row.passes - 1
            if isinstance(model, DistributedDataParallel):
                unsynchronised = nullcontext() if is_last else model.no_sync()
            else:
                model.set_requires_gradient_sync(is_last or row.partial)
                model.set_requires_all_reduce(is_last)
                unsynchronised = nullcontext()
            with unsynchronised:
                images = random_images(4, seed=100 * number + 10 * micro + dist.get_rank())
                logits = model(images).float()
                loss = nn.functional.cross_entropy(logits, torch.arange(4) + micro)
                (loss / row.passes).backward()
        if row.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), row.clip)
        self.optimizer.step()

    @property
    def weights(self) -> dict[str, Tensor]:
        """Copies of all parameters.  Collective."""
        return {name: full(p) for name, p in self.network.named_parameters()}

    @property
    def moments(self) -> dict[str, Tensor]:
        """Copies of the optimizer's state by name and key.  Collective."""
        return {
            f"{name} {key}": full(value)
            for name, p in self.network.named_parameters()
            for key, value in self.optimizer.state[p].items()
        }
