"""Benchmark of overhead: an engine that truncates nothing, and a check."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import TruncationConfig, WormConfig
from ..engine.attach import attach
from ..engine.engine import Engine
from ..models import build_model
from .network import Link, num_collectives, over_ranks
from .results import Panel, Spread, rows
from .step import seconds_of
from .variants import DDP, Batch, Step, Variant, dense, training
from .workload import Workload, alternate

__all__ = ["overhead"]

_TIMES_THE_ROUNDS = 8
"""Factor on the number of rounds, as differences of a few percent must be resolved."""
_CHECKS = 12
"""Number of checks."""


def overhead(workload: Workload) -> Panel:
    """Measure the seconds of a step with and without an engine, and of a check.  Collective."""
    link = Link()
    variants = _variants(workload)
    measured = alternate(variants, _TIMES_THE_ROUNDS * workload.rounds, seconds_of)
    return Panel(
        key="overhead",
        title="Seconds a step, nothing truncated",
        unit="s",
        rows=rows(variants, over_ranks(measured, dist.ReduceOp.MAX)),
        setting={"network": link.network, "rounds": len(measured[0])},
        figures=_check(workload),
    )


def _variants(workload: Workload) -> list[Variant]:
    batch = workload.batch()
    loops = {DDP: dense(*training(workload.build), batch)}
    # A second DDP run; its difference from the first one is noise.
    loops["DDP again"] = dense(*training(workload.build), batch)
    engine = _engine(workload)
    loops["engine attached"] = dense(engine.model, engine.optimizer, batch)
    loops["engine and its L1 penalty"] = _penalised(_engine(workload), batch)
    return [Variant(name, loop, lambda: None, None) for name, loop in loops.items()]


def _engine(workload: Workload) -> Engine:
    images, _ = workload.batch()
    return attach(*training(workload.build), example_inputs=images[:1], steps_per_epoch=1)


def _penalised(engine: Engine, batch: Batch) -> Step:
    """The step of a search with the L1 penalty, which a search without an engine needs as well."""
    images, labels = batch

    def step() -> None:
        engine.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(engine.model(images), labels) + engine.penalty()
        loss.backward()
        engine.optimizer.step()

    return step


def _check(workload: Workload) -> dict[str, float]:
    """Measure ``Engine.check`` on the larger network."""
    network = build_model(workload.checked_model, 10, 3)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.1, 1)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(1, 3, 32, 32)
    config = WormConfig(truncation=TruncationConfig(mode="off"))
    engine = attach(model, optimizer, config, example_inputs=images, steps_per_epoch=1)
    before = num_collectives(model.process_group)
    engine.check()
    collectives = num_collectives(model.process_group) - before
    seconds = [_seconds_of_check(engine) for _ in range(_CHECKS)]
    ((*slowest,),) = over_ranks([seconds], dist.ReduceOp.MAX)
    return {
        "channels of the norms": sum(norm.num_features for norm in norms),
        "channels that are scored": engine.groups.num_channels,
        "collectives of a check": collectives,
        "check, median (ms)": 1000 * Spread.of(slowest).median,
        "check, third quartile (ms)": 1000 * Spread.of(slowest).high,
    }


def _seconds_of_check(engine: Engine) -> float:
    engine.optimizer.step()  # without gradients no weight changes, but a check is due again
    dist.barrier()
    begin = time.perf_counter()
    engine.check()
    return time.perf_counter() - begin
