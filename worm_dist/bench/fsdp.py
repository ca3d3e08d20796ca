"""Benchmark of network traffic under ``fully_shard``, dense and with half of the channels live."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

from ..config import SearchConfig, TruncationConfig, WormConfig
from ..engine.attach import attach
from ..groups.freeze_plan import FreezePlan
from ..groups.gates import gated
from ..training.fully_sharded import shard
from .results import Panel
from .variants import AT_ONCE, Batch, Variant, dense, scattered_mask
from .wire import bytes_sent
from .workload import Workload

__all__ = ["UNIT_MB", "fsdp", "optimizer_of", "sharded", "unsharded"]

UNIT_MB = 6.0
"""Modules of this size are sharded by themselves: a residual block, or a layer of a transformer."""
_DENSE, _HELD, _LEFT = "fully_shard", "worm 50 %", "worm 50 %, left"


def fsdp(workload: Workload) -> Panel:
    """Measure the megabytes that a rank sends in a step.  Collective.

    They include the reduce-scatter of gradients and the all-gathers of weights, in the forward and
    in the backward pass.  The all-gathers are dense until channels have left.
    """
    build, batch = workload.build, workload.batch()
    left, live_share = _half(_LEFT, build, batch, TruncationConfig(removal=AT_ONCE))
    held, _ = _half(_HELD, build, batch, TruncationConfig(frozen_weights="hold"))
    model = sharded(build)
    step = dense(model, optimizer_of(model), batch)
    compared = [Variant(_DENSE, step, lambda: 1.0, 1.0), held, left]
    rows, setting = bytes_sent(compared, workload.rounds)
    value = {row.name: row.value.median for row in rows}
    return Panel(
        key="fsdp",
        title="Bytes on the wire under fully_shard, a step and rank",
        unit="MB",
        rows=rows,
        setting={
            **setting,
            "gloo": "reduce-scatters by an all-reduce, twice the bytes, and so do all rows",
        },
        figures={
            f"{_HELD} / dense": value[_HELD] / value[_DENSE],
            f"{_LEFT} / dense": value[_LEFT] / value[_DENSE],
            f"{_LEFT} / dense / live share": value[_LEFT] / value[_DENSE] / live_share,
        },
    )


def _half(
    name: str, build: Callable[[], nn.Module], batch: Batch, truncation: TruncationConfig
) -> tuple[Variant, float]:
    """The variant, and the share of live elements once the frozen channels have left."""
    model = sharded(build)
    optimizer = optimizer_of(model)
    config = WormConfig(truncation=truncation)
    engine = attach(model, optimizer, config, example_inputs=batch[0][:1], steps_per_epoch=1)
    mask = scattered_mask(engine.groups)
    engine.truncate(mask)
    left = FreezePlan(model, engine.groups, ~mask.keep, "coupled")
    variant = Variant(
        name,
        dense(engine.model, engine.optimizer, batch),
        lambda: engine.traffic.sent_bytes / engine.traffic.dense_bytes,
        None,  # padded
    )
    return variant, left.live_fraction(list(model.parameters()))


def unsharded(build: Callable[[], nn.Module]) -> nn.Module:
    """The network before it is sharded; it has equal weights on all ranks."""
    torch.manual_seed(0)
    return gated(build(), SearchConfig())


def sharded(build: Callable[[], nn.Module]) -> nn.Module:
    """The network, sharded over all ranks.  Collective."""
    return shard(unsharded(build), UNIT_MB, dist.get_world_size(), torch.device("cpu"))


def optimizer_of(model: nn.Module) -> SGD:
    """The optimizer, alike for all variants."""
    return SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
