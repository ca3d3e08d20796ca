"""Measurement of steps and checks on any number of ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...config import TruncationConfig, WormConfig
from ...engine.attach import attach
from ...engine.engine import Engine
from ...groups.flops import count_flops_by_module
from ...groups.freeze_plan import FreezePlan
from ...planning.buckets import buckets_of
from ...planning.step_time import Bucket, StepTime
from ...planning.step_time import Link as PlannedLink
from ..network import Link, over_ranks
from ..variants import DDP, HALF, WARM_UP, Batch, dense, training, uniform_mask
from ..workload import Workload
from .row import CHECK, ScaleRow

__all__ = ["measure"]

_IN_A_ROW = 3
"""Steps of one variant before those of the next."""
_CHECKS = 8
_PINGS = 20


@dataclass(frozen=True)
class _Variant:
    name: str
    model: DistributedDataParallel
    step: Callable[[], object]
    payload: Mapping[str, int]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True)
class _Sent:
    seconds: float
    bytes: float
    packets: float


def measure(workload: Workload) -> Iterator[ScaleRow]:
    """Measure plain DDP, half of the channels frozen, the drawn half, and a check.  Collective.

    Args:
        workload: the network, the batch of each rank, and the number of rounds.
    """
    link = _CountedLink()
    latency = _latency()
    variants = list(_variants(workload))
    for variant in variants:
        for _ in range(WARM_UP):
            variant.step()
    steps: dict[str, list[_Sent]] = {variant.name: [] for variant in variants}
    computing: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(workload.rounds):
        for variant in variants:
            steps[variant.name] += [link.sent_by(variant.step) for _ in range(_IN_A_ROW)]
            with variant.model.no_sync():  # the same work on all ranks, but no collective
                alone = [link.sent_by(variant.step).seconds for _ in range(_IN_A_ROW)]
            computing[variant.name] += alone
    for variant in variants:
        measured = _typical(steps[variant.name])
        ((*alone,),) = over_ranks([computing[variant.name]], dist.ReduceOp.MAX)
        compute_seconds = statistics.median(alone)
        payload = sum(variant.payload.values())
        yield ScaleRow(
            model=workload.model,
            variant=variant.name,
            ranks=dist.get_world_size(),
            network=link.network,
            collectives=sum(bucket.payload_bytes > 0 for bucket in variant.buckets),
            payload_bytes=payload,
            ring_bytes=_ring_bytes(payload),
            wire_bytes=0.0 if link.is_loopback else measured.bytes,
            packets=0.0 if link.is_loopback else measured.packets,
            seconds=measured.seconds,
            compute_seconds=compute_seconds,
            latency_seconds=latency,
            estimate_seconds=_estimate(variant, compute_seconds, link, latency),
        )
    yield _check(workload, link, latency)


def _variants(workload: Workload) -> Iterator[_Variant]:
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
) -> _Variant:
    assert isinstance(model, DistributedDataParallel)
    flops = count_flops_by_module(model.module, batch[0][:1])
    return _Variant(name, model, step, payload, buckets_of(model.module, payload, flops))


def _check(workload: Workload, link: _CountedLink, latency: float) -> ScaleRow:
    images, _ = workload.batch()
    config = WormConfig(search={"l1": 0}, truncation=TruncationConfig(mode="off"))
    model, optimizer = training(workload.build)
    engine = attach(model, optimizer, config, example_inputs=images[:1], steps_per_epoch=1)

    def check() -> None:
        engine.check()

    measured, payload, collectives = [], 0, 0
    for _ in range(_CHECKS):
        engine.optimizer.step()  # without gradients no weight changes, but a check is due again
        sent, begun = engine.traffic.control_bytes, _num_collectives()
        measured.append(link.sent_by(check))
        payload = engine.traffic.control_bytes - sent
        collectives = _num_collectives() - begun - 2  # without the two barriers
    typical = _typical(measured)
    return ScaleRow(
        model=workload.model,
        variant=CHECK,
        ranks=dist.get_world_size(),
        network=link.network,
        collectives=collectives,
        payload_bytes=payload,
        ring_bytes=_ring_bytes(payload),
        wire_bytes=0.0 if link.is_loopback else typical.bytes,
        packets=0.0 if link.is_loopback else typical.packets,
        seconds=typical.seconds,
        compute_seconds=0.0,
        latency_seconds=latency,
        estimate_seconds=None,
    )


def _ring_bytes(payload: int) -> float:
    """Bytes that a rank sends in a ring all-reduce."""
    size = dist.get_world_size()
    return 2 * (size - 1) / size * payload


def _estimate(
    variant: _Variant, compute_seconds: float, link: Link, latency: float
) -> float | None:
    if link.bits_per_second is None:
        return None
    planned = PlannedLink(dist.get_world_size(), link.bits_per_second, link.network, latency)
    return StepTime.of(compute_seconds, variant.buckets, planned).expected_seconds


def _latency() -> float:
    """Seconds of a message: those of an all-reduce of one element, which is a ring of them."""
    element = torch.zeros(1)
    seconds = []
    for _ in range(_PINGS):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(element)
        seconds.append(time.perf_counter() - begin)
    ((*slowest,),) = over_ranks([seconds], dist.ReduceOp.MAX)
    return statistics.median(slowest) / (2 * (dist.get_world_size() - 1))


def _num_collectives() -> int:
    group = dist.group.WORLD
    return int(group._get_sequence_number_for_group())  # type: ignore[union-attr]


class _CountedLink(Link):
    def sent_by(self, work: Callable[[], object]) -> _Sent:
        """Time some work that starts on all ranks at once, and count what it sends."""
        dist.barrier()
        before = self.sent_bytes(), self.sent_packets()
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        dist.barrier()  # then all that was sent has arrived
        return _Sent(seconds, self.sent_bytes() - before[0], self.sent_packets() - before[1])


def _typical(measured: list[_Sent]) -> _Sent:
    """Median seconds of the slowest rank; bytes and packets as means over the ranks."""
    ((*slowest,),) = over_ranks([[each.seconds for each in measured]], dist.ReduceOp.MAX)
    size = dist.get_world_size()
    counts = [[each.bytes for each in measured], [each.packets for each in measured]]
    sent, packets = over_ranks(counts, dist.ReduceOp.SUM)
    return _Sent(
        statistics.median(slowest),
        statistics.median(sent) / size,
        statistics.median(packets) / size,
    )
