"""FSDP collectives: those of ``fully_shard`` that a function of ours may replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

__all__ = ["PackedAllGather", "PackedReduceScatter"]


class PackedReduceScatter(DefaultReduceScatter):
    """A reduce-scatter that calls a function first, which may do it instead."""

    def __init__(self, replacement: Callable[..., bool]) -> None:
        self._replacement = replacement

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self._replacement(output_tensor, input_tensor, group, op):
            return None
        return super().__call__(output_tensor, input_tensor, group, op, async_op)


class PackedAllGather(DefaultAllGather):
    """An all-gather that calls a function first, which may do it instead."""

    def __init__(self, replacement: Callable[..., bool]) -> None:
        self._replacement = replacement

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self._replacement(output_tensor, input_tensor, group):
            return None  # torch then waits for the event that it records behind this call
        return super().__call__(output_tensor, input_tensor, group, async_op)
