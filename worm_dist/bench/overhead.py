"""Overhead: what an engine costs that truncates nothing, and what a check costs."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import RemovalConfig, TruncationConfig, WormConfig
from ..engine.engine import Engine, attach
from ..interval import Interval
from ..models import build_model
from ..verdict import Phase
from .network import Link, over_ranks
from .results import Panel, Spread, rows
from .step import seconds_of
from .variants import DDP, HALF, WARM_UP, Batch, Step, Variant, dense, keeping, training
from .workload import Scale, alternate

__all__ = ["overhead"]

_TIMES_THE_ROUNDS = 8
"""A few percent are looked for, so there are more rounds than in the other benchmarks."""
_CHECKS = 12
"""The third starts truncation, and has to plan it."""


def overhead(scale: Scale) -> Panel:
    """Seconds of a step with and without an engine, and of a check.  Collective."""
    link = Link()
    running = _contenders(scale)
    measured = alternate(running, _TIMES_THE_ROUNDS * scale.rounds, seconds_of)
    return Panel(
        key="overhead",
        title="Seconds a step, nothing truncated",
        unit="s",
        rows=rows(running, over_ranks(measured, dist.ReduceOp.MAX)),
        setting={"network": link.network, "rounds": len(measured[0])},
        figures={**_check(scale), **_stages(scale)},
    )


def _contenders(scale: Scale) -> list[Variant]:
    batch = scale.batch()
    loops = {DDP: dense(*training(scale.build), batch)}
    # The same once more: what it differs by is noise.
    loops["DDP again"] = dense(*training(scale.build), batch)
    engine = _engine(scale)
    loops["engine attached"] = dense(engine.model, engine.optimizer, batch)
    loops["engine and its L1 penalty"] = _penalised(_engine(scale), batch)
    return [Variant(name, loop, lambda: None, None) for name, loop in loops.items()]


def _engine(scale: Scale) -> Engine:
    images, _ = scale.batch()
    return attach(*training(scale.build), example_inputs=images[:1], steps_per_epoch=1)


def _penalised(engine: Engine, batch: Batch) -> Step:
    """The loop of a search; without an engine, a search would pay for the penalty as well."""
    images, labels = batch

    def step() -> None:
        engine.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(engine.model(images), labels) + engine.penalty()
        loss.backward()
        engine.optimizer.step()

    return step


def _check(scale: Scale) -> dict[str, float]:
    """What ``Engine.check`` costs on the larger network."""
    network = build_model(scale.model_of_checks, 10, 3)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.1, 1)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(1, 3, 32, 32)
    # Where frozen channels leave, checks cut no other mask.
    config = WormConfig(truncation=TruncationConfig(frozen_weights="hold"))
    engine = attach(model, optimizer, config, example_inputs=images, steps_per_epoch=1)
    before = _num_collectives(model.process_group)
    engine.check()
    collectives = _num_collectives(model.process_group) - before
    seconds = [_seconds_of_check(engine) for _ in range(_CHECKS)]
    ((*slowest,),) = over_ranks([seconds], dist.ReduceOp.MAX)
    return {
        "channels of the norms": sum(norm.num_features for norm in norms),
        "channels that are scored": engine.groups.num_channels,
        "collectives of a check": collectives,
        "check, median (ms)": 1000 * Spread.of(slowest).median,
        "check, third quartile (ms)": 1000 * Spread.of(slowest).high,
        "check that starts truncation (ms)": 1000 * max(slowest),
    }


def _stages(scale: Scale) -> dict[str, float]:
    """What a stage of the draw costs, the new wrapper included, beside a dense step."""
    batch = scale.batch()
    model, optimizer = training(scale.build)
    step = dense(model, optimizer, batch)
    for _ in range(WARM_UP):
        step()
    steps = [seconds_of(step) for _ in range(scale.rounds)]
    removal = RemovalConfig(duration=Interval(8, "ba"), fade_steps=1, stage=0.1)
    config = WormConfig(truncation=TruncationConfig(removal=removal))
    engine = attach(model, optimizer, config, example_inputs=batch[0][:1], steps_per_epoch=100)
    engine.truncate(keeping(engine.groups, HALF))
    draws = []
    while engine.phase is not Phase.TICKET:
        dense(engine.model, optimizer, batch)()
        verdict = engine.check()
        if verdict.stage or verdict.ticket:
            draws.append(seconds_of(engine.draw))
    slowest_steps, slowest_draws = (
        over_ranks([steps], dist.ReduceOp.MAX)[0],
        over_ranks([draws], dist.ReduceOp.MAX)[0],
    )
    step_ms, stage_ms = (1000 * Spread.of(s).median for s in (slowest_steps, slowest_draws))
    return {
        "stages of the draw": len(draws),
        "stage, median (ms)": stage_ms,
        "stage, in dense steps": stage_ms / step_ms,
    }


def _num_collectives(group: dist.ProcessGroup) -> int:
    """gloo numbers them; what torch's debug modes compare across the ranks."""
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]


def _seconds_of_check(engine: Engine) -> float:
    engine.optimizer.step()  # there are no gradients: nothing moves, but a check is due again
    dist.barrier()
    begin = time.perf_counter()
    engine.check()
    return time.perf_counter() - begin
