"""Benchmark of network traffic under DeepSpeed's ZeRO, dense and with half of the channels live."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from ..config import SearchConfig, TruncationConfig, WormConfig
from ..engine.attach import attach
from ..engine.engine import Engine
from ..groups.gates import gated
from ..training.parallelize import deepspeed_module
from .results import Panel
from .variants import AT_ONCE, HALF, Batch, Step, Variant, scattered_mask, uniform_mask
from .wire import bytes_sent
from .workload import Workload

__all__ = ["zero"]

_STAGES = (0, 1, 2, 3)
_FADED = ", faded"
"""Suffix of the variant whose frozen channels are zero."""


def zero(workload: Workload) -> Panel:
    """Measure the megabytes that a rank sends in a step, for ZeRO stages 0 to 3.  Collective.

    They include gradients and, in stages 1 to 3, all-gathers of the weights.  In stage 3 these are
    dense until channels are zero, so it is measured with faded channels too.
    """
    rows, setting = bytes_sent(list(_variants(workload.build, workload.batch())), workload.rounds)
    value = {row.name: row.value.median for row in rows}
    return Panel(
        key="zero",
        title="Bytes on the wire under DeepSpeed, a step and rank",
        unit="MB",
        rows=rows,
        setting=setting,
        figures={
            f"ZeRO-{stage}, half of the rows{suffix} / dense": value[_name(stage, HALF) + suffix]
            / value[_name(stage, None)]
            for stage in _STAGES
            for suffix in ("", _FADED)
            if _name(stage, HALF) + suffix in value
        },
    )


def _name(stage: int, share: float | None) -> str:
    return f"ZeRO-{stage}" if share is None else f"worm {100 * share:.0f} %, ZeRO-{stage}"


def _variants(build: Callable[[], nn.Module], batch: Batch) -> Iterator[Variant]:
    for stage in _STAGES:
        model = _engine(build, stage, batch)
        yield Variant(_name(stage, None), _step(model, batch), lambda: None, None)
        yield _half(build, stage, batch, TruncationConfig(frozen_weights="hold"))
    faded = _half(build, 3, batch, TruncationConfig(removal=AT_ONCE))
    yield dataclasses.replace(faded, name=faded.name + _FADED)


def _half(
    build: Callable[[], nn.Module], stage: int, batch: Batch, truncation: TruncationConfig
) -> Variant:
    model = _engine(build, stage, batch)
    config = WormConfig(truncation=truncation)
    engine = attach(model, None, config, example_inputs=batch[0][:1], steps_per_epoch=1)
    mask = uniform_mask(engine.groups, HALF) if stage < 3 else scattered_mask(engine.groups)
    engine.truncate(mask)
    return Variant(_name(stage, HALF), _step(model, batch), _sent_share(engine), None)


def _engine(build: Callable[[], nn.Module], stage: int, batch: Batch) -> Any:
    torch.manual_seed(0)
    network = gated(build(), SearchConfig())  # attention has no norms of its own
    optimizer = SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    settings = {
        "train_micro_batch_size_per_gpu": len(batch[0]),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed_module(batch[0].device).initialize(
        model=network, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def _step(model: Any, batch: Batch) -> Step:
    images, labels = batch

    def step() -> None:
        model.backward(nn.functional.cross_entropy(model(images), labels))
        model.step()

    return step


def _sent_share(engine: Engine) -> Callable[[], float | None]:
    return lambda: engine.traffic.sent_bytes / engine.traffic.dense_bytes
