"""Partitions: parameters whose master weights and moments are dealt out to the ranks in one row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from worm_dist.backends.optimizer_view import OptimizerView, Shard

__all__ = ["PartitionView", "full_row", "partition"]


class PartitionView(OptimizerView):
    """View of an optimizer that steps this rank's part of the row.

    Args:
        parameters: in the row, in this order.
        own: this rank's part of the row, which the optimizer steps.
    """

    copies = shared = True

    def __init__(self, parameters: Sequence[nn.Parameter], own: Tensor) -> None:
        super().__init__(AdamW([own], lr=0.1))
        self._parameters = parameters
        self._own = own

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        return [self._parameters]

    def owner(self, parameter: Tensor) -> Tensor:
        return self._own

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        first = self._own.numel() * dist.get_rank()
        offset = 0
        for other in self._parameters:
            if other is parameter:
                break
            offset += other.numel()
        begin = max(offset, first)
        end = min(offset + parameter.numel(), first + self._own.numel())
        if begin >= end:
            return ()
        value = self._own.detach()[begin - first : end - first]
        if value.numel() == parameter.numel():
            value = value.view(parameter.shape)
        return (Shard(value, begin - offset, self._own, begin - first),)


def full_row(parameters: Sequence[nn.Parameter], seed: int) -> Tensor:
    """Float32 elements of any bits for all parameters, and padding for the last rank."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(p.numel() for p in parameters)
    count += -count % dist.get_world_size()
    memory = torch.randint(256, (4 * count,), generator=generator)
    return memory.to(torch.uint8).view(torch.float32)


def partition(row: Tensor) -> Tensor:
    """A copy of this rank's part of a row."""
    return row.chunk(dist.get_world_size())[dist.get_rank()].clone()
