"""Benchmark of hiccups: the moments at which a run with an engine waits longer than for a step."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..config import ElbowConfig, RemovalConfig, SearchConfig, TruncationConfig, WormConfig
from ..engine.attach import attach
from ..interval import Interval
from ..models import build_model
from ..verdict import Phase
from .network import Link, over_ranks
from .results import Panel, Spread, rows
from .step import seconds_of
from .variants import DDP, WARM_UP, Batch, Step, Variant, dense, training
from .workload import Workload

__all__ = ["hiccup"]

_ROUNDS = 4
"""Number of whole runs, as each has only one start of truncation."""
_CHECKS = 6
"""Checks up to the one that starts truncation."""
_REMOVAL = RemovalConfig(duration=Interval(8, "ba"), fade_steps=1)

_CHECK = "check"
_START = "check that starts truncation"
_AFTER_START = "step after it"
_FIRST, _LATER = "first stage of the draw", "later stage of the draw"
_AFTER_STAGE = "step after a stage"


def hiccup(workload: Workload) -> Panel:
    """Measure checks, the start of truncation, stages of the draw, and the steps after them, beside
    steps of plain DDP.  Collective."""
    link = Link()

    def build() -> nn.Module:
        return _with_scales(build_model(workload.checked_model, 10, 3))

    batch = workload.batch()
    baseline = dense(*training(build), batch)
    for _ in range(WARM_UP):
        baseline()
    rounds = [_run(build(), batch, baseline) for _ in range(min(_ROUNDS, workload.rounds))]
    variants = [Variant(name, lambda: None, lambda: None, None) for name in rounds[0]]
    values = [[each[variant.name] for each in rounds] for variant in variants]
    return Panel(
        key="hiccup",
        title="Seconds of what does not happen in every step",
        unit="s",
        rows=rows(variants, values),
        setting={
            "network": link.network,
            "rounds": len(rounds),
            "network checked": f"{workload.checked_model}, {workload.images} images a rank",
        },
        figures={f"{_START}, in other checks": _ratio(rounds, _START, _CHECK)},
    )


def _with_scales(network: nn.Module) -> nn.Module:
    """The network with the scales of a trained one, which differ."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 1)
    return network


def _run(network: nn.Module, batch: Batch, baseline: Step) -> Mapping[str, float]:
    """Take a network through search, truncation and draw; the seconds of the slowest rank, the
    median where there are several."""
    model, optimizer = training(lambda: network)
    config = WormConfig(
        search=SearchConfig(
            every=Interval(1, "ba"),
            l1=0.0,
            elbow=ElbowConfig(min_masks=1000, latest=Interval(_CHECKS, "ba")),
        ),
        truncation=TruncationConfig(removal=_REMOVAL),
    )
    images, _ = batch
    engine = attach(model, optimizer, config, example_inputs=images[:1], steps_per_epoch=100)

    def step() -> None:
        dense(engine.model, engine.optimizer, batch)()

    measured: dict[str, list[float]] = defaultdict(list)
    while engine.phase is Phase.SEARCH:
        measured[DDP].append(seconds_of(baseline))
        step()
        measured[_CHECK].append(seconds_of(engine.check))
    measured[_START] = [measured[_CHECK].pop()]
    measured[_AFTER_START] = [seconds_of(step)]
    while engine.phase is not Phase.TICKET:
        verdict = engine.check()
        if verdict.stage or verdict.ticket:
            measured[DDP].append(seconds_of(baseline))
            measured[_LATER if measured[_FIRST] else _FIRST].append(seconds_of(engine.draw))
            measured[_AFTER_STAGE].append(seconds_of(step))
        else:
            step()
    slowest = {
        name: over_ranks([values], dist.ReduceOp.MAX)[0] for name, values in measured.items()
    }
    return {name: statistics.median(values) for name, values in slowest.items()}


def _ratio(rounds: Sequence[Mapping[str, float]], name: str, baseline: str) -> float:
    """The median over the rounds."""
    return Spread.of([each[name] / each[baseline] for each in rounds]).median
