"""Off is free: without truncation the engine changes no bit of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.nets import Flattening, Residual, random_images, randomise
from tests.ranks import NO_GROUP, Ranks
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("trains with and without an engine, ten seconds")

NUM_STEPS = 12
L1 = 0.01


def _model(build: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = build()
    randomise(network, seed=3)
    return DistributedDataParallel(network) if dist.is_initialized() else network


def _optimizer(model: nn.Module, name: str) -> Optimizer:
    if name == "sgd":
        return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    return AdamW(model.parameters(), lr=0.01)


def _images(step: int) -> Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return random_images(8, seed=100 * step + rank)


def _flat(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for key in state for leaf in (key, *_flat(state[key]))]
    if isinstance(state, (list, tuple)):
        return [leaf for value in state for leaf in _flat(value)]
    return [state]


def _equal(one: Any, two: Any) -> bool:
    leaves, others = _flat(one), _flat(two)
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others)
    )


def _train_both(preset: str, l1: float, build: type[nn.Module], optimizer_name: str) -> str:
    model = _model(build)
    optimizer = _optimizer(model, optimizer_name)
    config = WormConfig.preset(preset, search={"l1": l1, "window": 3})
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    torch.manual_seed(5)  # dropout
    for step in range(NUM_STEPS):
        engine.optimizer.zero_grad()
        loss = engine.model(_images(step)).square().mean() + engine.penalty()
        loss.backward()
        engine.optimizer.step()
        if step % 2:
            engine.check()
    random = torch.get_rng_state()

    reference = _model(build)
    plain = _optimizer(reference, optimizer_name)
    scales: list[Tensor] = [
        m.weight for m in reference.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    torch.manual_seed(5)
    for step in range(NUM_STEPS):
        plain.zero_grad()
        loss = reference(_images(step)).square().mean()
        if preset != "dense" and l1:
            loss = loss + l1 * torch.cat(scales).abs().sum()
        loss.backward()
        plain.step()

    assert engine.model is model and engine.optimizer is optimizer
    assert torch.equal(torch.get_rng_state(), random)
    assert _equal(model.state_dict(), reference.state_dict())
    assert _equal(optimizer.state_dict(), plain.state_dict())
    assert engine.traffic.total_sent_bytes == engine.traffic.total_dense_bytes
    return engine.phase


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("build", [Residual, Flattening])
@pytest.mark.parametrize(
    ("preset", "l1"), [("dense", 0.0), ("early-bird", 0.0), ("early-bird", L1)]
)
@pytest.mark.parametrize("world_size", [NO_GROUP, 1, 2])
def test_training_is_bit_equal_to_the_plain_loop(
    ranks: Ranks,
    world_size: int,
    preset: str,
    l1: float,
    build: type[nn.Module],
    optimizer: str,
) -> None:
    phase = "dense" if preset == "dense" else "search"
    assert set(ranks(world_size, _train_both, preset, l1, build, optimizer)) == {phase}


def test_a_control_without_a_search_needs_nothing_to_rank() -> None:
    """``dense`` was refused on a network without norms: there was nothing to search, though
    nothing was to be searched."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = SGD(network.parameters(), lr=0.1)
    config = WormConfig.preset("dense", search={"importance": "norm_scale"})
    engine = worm_dist.attach(network, optimizer, config, example_inputs=torch.zeros(1, 4))
    (engine.model(torch.ones(2, 4)).sum() + engine.penalty()).backward()
    engine.optimizer.step()
    assert not engine.groups and engine.check().phase == "dense"
