"""Measurement of steps and checks on any number of ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...config import TruncationConfig, WormConfig
from ...engine.attach import attach
from ...planning.step_time import Link as PlannedLink
from ...planning.step_time import StepTime, ring_bytes
from ..network import Link, num_collectives, over_ranks
from ..variants import WARM_UP, training
from ..workload import Workload
from .row import CHECK, ScaleRow
from .variants import Backend, ScaleVariant, variants_of

__all__ = ["measure"]

_IN_A_ROW = 3
"""Steps of one variant before those of the next."""
_CHECKS = 8
_PINGS, _PROBES = 20, 7


@dataclass(frozen=True)
class _Sent:
    seconds: float
    bytes: float
    packets: float


def measure(workload: Workload, backend: Backend = "ddp") -> Iterator[ScaleRow]:
    """Measure dense steps, half of the channels frozen, the drawn half, and a check.  Collective.

    Args:
        workload: the network, the batch of each rank, and the number of rounds.
        backend: what the ranks train with; the check is DistributedDataParallel's.
    """
    link = _CountedLink()
    latency = _latency()
    variants = list(variants_of(workload, backend))
    bandwidth = _bandwidth(variants[0].gradient_bytes, latency)
    for variant in variants:
        for _ in range(WARM_UP):
            variant.step()
    steps: dict[str, list[_Sent]] = {variant.name: [] for variant in variants}
    computing: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(workload.rounds):
        for variant in variants:
            steps[variant.name] += [link.sent_by(variant.step) for _ in range(_IN_A_ROW)]
            alone = [link.sent_by(variant.alone).seconds for _ in range(_IN_A_ROW)]
            computing[variant.name] += alone
    for variant in variants:
        measured = _typical(steps[variant.name])
        ((*alone,),) = over_ranks([computing[variant.name]], dist.ReduceOp.MAX)
        compute_seconds = statistics.median(alone)
        yield ScaleRow(
            model=workload.model,
            variant=variant.name,
            ranks=dist.get_world_size(),
            network=link.network,
            collectives=sum(each.payload_bytes > 0 for each in variant.collectives),
            payload_bytes=sum(each.payload_bytes for each in variant.collectives),
            ring_bytes=sum(
                ring_bytes(each, _planned_link(1.0, 0.0)) for each in variant.collectives
            ),
            wire_bytes=0.0 if link.is_loopback else measured.bytes,
            packets=0.0 if link.is_loopback else measured.packets,
            seconds=measured.seconds,
            compute_seconds=compute_seconds,
            latency_seconds=latency,
            bits_per_second=bandwidth,
            estimate_seconds=_estimate(variant, compute_seconds, bandwidth, latency),
            nominal_estimate_seconds=None
            if link.bits_per_second is None
            else _estimate(variant, compute_seconds, link.bits_per_second, latency),
        )
    yield _check(workload, link, latency, bandwidth)


def _check(workload: Workload, link: _CountedLink, latency: float, bandwidth: float) -> ScaleRow:
    images, _ = workload.batch()
    config = WormConfig(search={"l1": 0}, truncation=TruncationConfig(mode="off"))
    model, optimizer = training(workload.build)
    engine = attach(model, optimizer, config, example_inputs=images[:1], steps_per_epoch=1)

    def check() -> None:
        engine.check()

    measured, payload, collectives = [], 0, 0
    for _ in range(_CHECKS):
        engine.optimizer.step()  # without gradients no weight changes, but a check is due again
        sent, begun = engine.traffic.control_bytes, num_collectives(model.process_group)
        measured.append(link.sent_by(check))
        payload = engine.traffic.control_bytes - sent
        collectives = num_collectives(model.process_group) - begun - 2  # without the two barriers
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
        bits_per_second=bandwidth,
        estimate_seconds=None,
        nominal_estimate_seconds=None,
    )


def _ring_bytes(payload: int) -> float:
    """Bytes that a rank sends in a ring all-reduce."""
    size = dist.get_world_size()
    return 2 * (size - 1) / size * payload


def _estimate(
    variant: ScaleVariant, compute_seconds: float, bits_per_second: float, latency: float
) -> float:
    link = _planned_link(bits_per_second, latency)
    return StepTime.of(compute_seconds, variant.collectives, link).expected_seconds


def _planned_link(bits_per_second: float, latency: float) -> PlannedLink:
    """The network between these ranks, for a forecast."""
    return PlannedLink(dist.get_world_size(), bits_per_second, "", latency, is_gloo=True)


def _latency() -> float:
    """Seconds of a message: those of an all-reduce of one element, which is a ring of them."""
    return _all_reduce_seconds(1, _PINGS) / (2 * (dist.get_world_size() - 1))


def _bandwidth(num_bytes: int, latency: float) -> float:
    """Bits per second of a rank's connection that an all-reduce of so many bytes reaches, while
    nothing is computed: so much that ``plan``'s formula gives its measured time.

    Args:
        num_bytes: bytes of all gradients of the dense network.
        latency: seconds of a message.
    """
    size = dist.get_world_size()
    seconds = _all_reduce_seconds(num_bytes // 4, _PROBES) - 2 * (size - 1) * latency
    return 2 * (size - 1) / size * num_bytes * 8 / max(seconds, 1e-9)


def _all_reduce_seconds(numel: int, times: int) -> float:
    """Median time of the slowest rank."""
    elements = torch.zeros(numel)
    seconds = []
    for _ in range(times):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(elements)
        seconds.append(time.perf_counter() - begin)
    ((*slowest,),) = over_ranks([seconds], dist.ReduceOp.MAX)
    return statistics.median(slowest)


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
