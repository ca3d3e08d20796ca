"""FSDP optimizer view: each rank steps its rows of every parameter that ``fully_shard`` shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..distributed.sharded import local
from .optimizer_view import Handle, OptimizerView, Owners, Shard

__all__ = ["FsdpOptimizerView", "local_part"]


class FsdpOptimizerView(OptimizerView):
    """View of a torch optimizer that steps sharded parameters (DTensors).

    Args:
        optimizer: the torch optimizer.
        reshard: lets the modules have their sharded parameters.
    """

    shared = True

    def __init__(self, optimizer: Optimizer, reshard: Callable[[], None]) -> None:
        super().__init__(optimizer)
        self._reshard = reshard

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        """See ``OptimizerView``: consecutive rows; none if the parameter has too few for all."""
        if not isinstance(parameter, DTensor):
            return (Shard(parameter, 0, parameter, 0),)
        value, begin = local_part(parameter)
        if not value.numel():
            return ()
        is_complete = value.numel() == parameter.numel()
        return (Shard(value if is_complete else value.view(-1), begin, parameter, 0),)

    def moments(self, shard: Shard) -> dict[str, Tensor]:
        state: dict[str, Any] = self.optimizer.state.get(shard.owner, {})
        moments = {key: m for key, m in state.items() if isinstance(m, DTensor)}
        return {
            key: local(moment).view(shard.value.shape)
            for key, moment in moments.items()
            if moment.shape == shard.owner.shape
        }

    def register_hooks(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        def before_step() -> None:
            self._reshard()
            before()

        return super().register_hooks(before_step, hold, after)


def local_part(parameter: DTensor) -> tuple[Tensor, int]:
    """This rank's rows of a parameter, detached, and the index of their first element in the
    flattened parameter."""
    part = local(parameter.detach())
    mesh = parameter.device_mesh
    dim = mesh.ndim - 1  # replicas, if there are any, are in the first dimension of the mesh
    rank, size = mesh.get_local_rank(dim), mesh.size(dim)
    num_rows = -(-len(parameter) // size)
    first = min(rank * num_rows, len(parameter))
    assert len(part) == min(num_rows, len(parameter) - first)
    return part, first * torch.Size(parameter.shape[1:]).numel()
