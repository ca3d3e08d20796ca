"""The memory that truncation is said to take is what it takes, to the byte."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import Engine, WormConfig
from worm_dist.comm_hooks.allreduce import AllReduce
from worm_dist.comm_hooks.ddp_hook import PackedReducer
from worm_dist.comm_hooks.packing import Packing
from worm_dist.comm_hooks.powersgd import PowerSGD
from worm_dist.groups.tracing import find_groups
from worm_dist.planning.hypothetical import drawn
from worm_dist.planning.memory import memory_of_stages, whole
from worm_dist.planning.target import Target
from worm_dist.pruning.recorded_inputs import most_recorded_bytes
from worm_dist.truncation.frozen_weights import Held
from worm_dist.truncation.memory import (
    TruncationMemory,
    num_held_moments,
    truncation_memory,
)
from worm_dist.truncation.slices import ManySlices

_WIDTH = 32  # the second convolution is written by rows and columns, the first by an index


def _packings(engine: Engine) -> list[Packing]:
    reducer = engine._training.reduction.reducer
    assert isinstance(reducer, PackedReducer)
    return [packing for packing in reducer._packings.values() if packing is not None]


def _taken(engine: Engine) -> TruncationMemory:
    """What is there, tensor by tensor."""
    policy = engine._dropped._truncation._weights
    reducer = engine._training.reduction.reducer
    assert isinstance(policy, Held) and isinstance(reducer, PackedReducer)
    assert policy._held is not None and policy._plan is not None and reducer.plan is not None
    weights = [t for held in policy._held for t in held._values or ()]
    moments = [t for held in policy._held for ts in held._moments.values() for t in ts or ()]
    buffers, indices = [], []
    for packing in _packings(engine):
        buffers += [packing.wire, *[packing._scratch] * ("_scratch" in vars(packing))]
        indices += [index for index, _ in packing._indices]
        indices += packing._columns.values()
    if isinstance(reducer.averager, AllReduce):
        buffers += reducer.averager._wires.values()
    elif isinstance(reducer.averager, PowerSGD):
        state = reducer.averager._state
        for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            buffers += kept.values()
    for held in policy._held:
        if isinstance(held._slices, ManySlices):
            indices += held._slices._indices.values()
    for plan in {policy._plan, reducer.plan}:
        for block in plan.blocks.values():
            indices += [*block.live.values(), *block.frozen.values()]
    sums = (sum(t.nbytes for t in tensors) for tensors in (weights, moments, buffers, indices))
    return TruncationMemory(*sums)


def _said(engine: Engine) -> TruncationMemory:
    policy, reducer = engine._dropped._truncation._weights, engine._training.reduction.reducer
    assert isinstance(policy, Held) and policy._plan is not None
    assert reducer is not None and reducer.plan is not None
    view = engine._training.optimizer_view
    return truncation_memory(
        policy._plan,
        reducer.plan,
        engine._training.trained,
        view.shards,
        engine._training._config.truncation,
        num_held_moments(view.optimizer),
    )


def _truncated(
    kind: type[Optimizer], options: dict[str, Any], truncation: dict[str, Any], bucket_mb: float
) -> Engine:
    torch.manual_seed(0)
    model = DistributedDataParallel(Plain(_WIDTH, _WIDTH), bucket_cap_mb=bucket_mb)
    optimizer = kind(model.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
    config = WormConfig(truncation=truncation)
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))

    def steps(count: int) -> None:
        for _ in range(count):
            engine.optimizer.zero_grad()
            engine.model(random_images(4, seed=engine.step)).square().mean().backward()
            engine.optimizer.step()

    steps(2)
    engine.truncate(mask_dropping(engine.groups, 0, 3, *range(_WIDTH, _WIDTH + 9)))
    steps(7)
    return engine


def _both(
    kind: type[Optimizer], options: dict[str, Any], truncation: dict[str, Any]
) -> tuple[TruncationMemory, TruncationMemory]:
    engine = _truncated(kind, options, truncation, 25)
    return _taken(engine), _said(engine)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SGD, {"momentum": 0.9}), (AdamW, {}), (AdamW, {"amsgrad": True})],
    ids=["SGD", "AdamW", "amsgrad"],
)
@pytest.mark.parametrize(
    "truncation",
    [
        {"frozen_weights": "hold"},
        {"frozen_weights": "hold", "scope": "coupled"},
        {"frozen_weights": "hold", "compression": "bf16"},
        {"frozen_weights": "hold", "compression": "powersgd"},
        at_once(2),
    ],
    ids=["hold", "coupled", "bf16", "powersgd", "faded"],
)
def test_what_is_said_is_what_is_taken(
    ranks: Ranks, kind: type[Optimizer], options: dict[str, Any], truncation: dict[str, Any]
) -> None:
    ((taken, said),) = ranks(1, _both, kind, options, truncation)
    assert taken == said
    assert said.weights > 0 and (said.moments == 0) == (kind is SGD)
    assert said.buffers > 0 and said.indices > 0


def _in_small_buckets() -> tuple[int, int, int, int]:
    """Bytes of buffers taken and said, of all live gradients that are packed, and of checksums."""
    engine = _truncated(SGD, {}, {"frozen_weights": "hold"}, 0.002)
    packings = _packings(engine)
    packed = 4 * sum(packing.num_live for packing in packings)
    return _taken(engine).buffers, _said(engine).buffers, packed, 2 * 4 * len(packings)


def test_buckets_that_are_not_packed_take_less(ranks: Ranks) -> None:
    """Not exact: which buckets DDP makes is not known before."""
    ((taken, said, packed, checksums),) = ranks(1, _in_small_buckets)
    assert taken == packed + checksums
    assert packed < said and checksums > 2 * 4


def test_recorded_inputs_are_bounded_in_number_and_in_bytes() -> None:
    assert most_recorded_bytes(8, 1000, 100) == 800
    assert most_recorded_bytes(8, 550, 100) == 500
    assert most_recorded_bytes(8, 50, 100) == 100, "the newest is kept whatever its size"
    assert most_recorded_bytes(0, 1000, 100) == 0


def test_attach_logs_what_it_will_take(caplog: pytest.LogCaptureFixture) -> None:
    network = Plain(_WIDTH, _WIDTH)
    optimizer = AdamW(network.parameters())
    with caplog.at_level(logging.INFO, "worm_dist"):
        config = WormConfig(truncation={"frozen_weights": "hold"})
        worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    (message,) = [r.getMessage() for r in caplog.records if "MiB" in r.getMessage()]
    assert message.startswith("while channels are frozen the engine will hold about 0.")
    assert "packed gradients 0.0," in message, "a single process sends nothing"


def test_soft_truncation_has_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    network: nn.Module = Plain()
    with caplog.at_level(logging.INFO, "worm_dist"):
        worm_dist.attach(
            network,
            SGD(network.parameters(), lr=0.1),
            WormConfig.preset("worm-paper"),
            example_inputs=random_images(1),
        )
    assert not [r for r in caplog.records if "MiB" in r.getMessage()]


def test_the_plan_of_a_run_has_the_buffers_that_are_sent() -> None:
    """On a GPU, where all gradients of this network are packed by an index."""
    target = Target("vgg_small", (1, 8, 8), 10, WormConfig(), optimizer="adamw")
    network = Plain(_WIDTH, _WIDTH)
    groups = find_groups(network, random_images(1))
    mask = mask_dropping(groups, *range(0, 2 * _WIDTH, 2))
    ticket, _ = drawn(network, groups, mask)
    stages = memory_of_stages(target, network, ticket, groups, mask, 10, whole, {})
    assert list(stages) == ["dense", "truncated", "faded", "ticket"]
    inputs = 8 * 10 * 8 * 8 * 4
    assert [stage.inputs for stage in stages.values()] == [inputs, inputs, inputs, 0]
    assert stages["dense"].total == inputs and stages["ticket"].total == 0
    faded = stages["faded"].truncation
    num_live = sum(p.numel() for p in ticket.parameters())
    assert faded.buffers == 4 * (num_live + 2)
    assert faded.weights == faded.moments == stages["truncated"].truncation.weights
