"""Compared steps, with the collectives that ``plan`` would estimate them from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...config import TruncationConfig, WormConfig
from ...engine.attach import attach
from ...engine.engine import Engine
from ...groups.flops import count_flops_by_module
from ...groups.freeze_plan import FreezePlan
from ...planning.buckets import buckets_of
from ...planning.fully_shard import FullyShard
from ...planning.hypothetical import drawn
from ...planning.module_order import module_order
from ...planning.stage import Stage, freeze_plans
from ...planning.step_time import Collective
from ...planning.traffic import left_out_in
from ...planning.wrapped import LeftOut
from ..fsdp import UNIT_MB, optimizer_of, sharded, unsharded
from ..variants import AT_ONCE, DDP, HALF, Batch, dense, scattered_mask, training, uniform_mask
from ..workload import Workload

__all__ = ["Backend", "ScaleVariant", "variants_of"]

Backend: TypeAlias = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class ScaleVariant:
    """A step that is measured.

    Attributes:
        name: its name in tables.
        step: takes the step.
        alone: takes the same step on every rank, without a collective.
        collectives: those that ``plan`` says it has.
    """

    name: str
    step: Callable[[], object]
    alone: Callable[[], object]
    collectives: Sequence[Collective]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that a rank hands to collectives."""
        return sum(each.payload_bytes for each in self.collectives if not each.sends_weights)


def variants_of(workload: Workload, backend: Backend) -> Iterator[ScaleVariant]:
    """The variants, the dense one first.  Collective."""
    return _under_ddp(workload) if backend == "ddp" else _under_fsdp(workload)


def _under_ddp(workload: Workload) -> Iterator[ScaleVariant]:
    batch = workload.batch()
    sample = batch[0][:1]
    model, optimizer = training(workload.build)
    every = {name: p.nbytes for name, p in model.module.named_parameters()}
    yield _variant(DDP, model, dense(model, optimizer, batch), every, batch)

    config = WormConfig(truncation=TruncationConfig(frozen_weights="hold"))
    engine = attach(*training(workload.build), config, example_inputs=sample, steps_per_epoch=1)
    mask = uniform_mask(engine.groups, HALF)
    engine.truncate(mask)
    network = _network(engine)
    plan = FreezePlan(network, engine.groups, ~mask.keep, "producer")
    live = {
        name: p.element_size() * prod(plan.blocks[p].live_shape if p in plan.blocks else p.shape)
        for name, p in network.named_parameters()
    }
    step = dense(engine.model, engine.optimizer, batch)
    yield _variant("half frozen", engine.model, step, live, batch)

    engine = attach(*training(workload.build), config, example_inputs=sample, steps_per_epoch=1)
    dense(engine.model, engine.optimizer, batch)()  # a draw estimates statistics from batches
    engine.draw(mask)
    left = {name: p.nbytes for name, p in _network(engine).named_parameters()}
    step = dense(engine.model, engine.optimizer, batch)
    yield _variant("half drawn", engine.model, step, left, batch)


def _network(engine: Engine) -> nn.Module:
    assert isinstance(engine.model, DistributedDataParallel)
    network: nn.Module = engine.model.module
    return network


def _variant(
    name: str,
    model: nn.Module,
    step: Callable[[], object],
    payload: Mapping[str, int],
    batch: Batch,
) -> ScaleVariant:
    assert isinstance(model, DistributedDataParallel)
    flops = count_flops_by_module(model.module, batch[0][:1])

    def alone() -> None:
        with model.no_sync():
            step()

    return ScaleVariant(name, step, alone, buckets_of(model.module, payload, flops))


def _under_fsdp(workload: Workload) -> Iterator[ScaleVariant]:
    batch = workload.batch()
    plain = unsharded(workload.build)
    model = sharded(workload.build)
    step = dense(model, optimizer_of(model), batch)
    planned = FullyShard(plain, int(UNIT_MB * 2**20), dist.get_world_size())
    yield _planned("fully_shard", step, planned, LeftOut(plain), batch)

    hold, left = TruncationConfig(frozen_weights="hold"), TruncationConfig(removal=AT_ONCE)
    stages: Sequence[tuple[str, Stage, TruncationConfig]]
    stages = (("half frozen, fsdp", "truncated", hold), ("half left, fsdp", "faded", left))
    for name, stage, truncation in stages:
        engine = _half_sharded(workload, truncation)
        groups, mask = engine.groups, scattered_mask(engine.groups)
        ticket, _ = drawn(plain, groups, mask)
        plans = freeze_plans(truncation, plain, groups, mask)
        left_out = left_out_in(truncation, plain, ticket, groups, mask, plans)
        step = dense(engine.model, engine.optimizer, batch)
        yield _planned(name, step, planned, left_out[stage], batch)

    engine = _half_sharded(workload, left)
    dense(engine.model, engine.optimizer, batch)()
    engine.draw(mask)
    step = dense(engine.model, engine.optimizer, batch)
    yield _planned("half drawn, fsdp", step, planned, left_out["ticket"], batch)


def _half_sharded(workload: Workload, truncation: TruncationConfig) -> Engine:
    model = sharded(workload.build)
    images, _ = workload.batch()
    config = WormConfig(truncation=truncation)
    engine = attach(
        model, optimizer_of(model), config, example_inputs=images[:1], steps_per_epoch=1
    )
    engine.truncate(scattered_mask(engine.groups))
    return engine


def _planned(
    name: str, step: Callable[[], object], planned: FullyShard, left_out: LeftOut, batch: Batch
) -> ScaleVariant:
    """A step of a sharded network; alone, that of the same network as a whole."""
    sample, network = batch[0][:1], left_out.network
    order = module_order(network, sample, count_flops_by_module(network, sample))
    alone = dense(network, optimizer_of(network), batch)
    return ScaleVariant(name, step, alone, planned.collectives(left_out, order))
