"""Low precision, loss scaling and averaged weights together with packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from worm_dist import ConfigError, Engine, WormConfig
from worm_dist.groups.freeze_plan import FreezePlan

DROPPED = (0, 3, 9)


def _engine(dtype: torch.dtype = torch.float32) -> Engine:
    torch.manual_seed(0)
    network: nn.Module = Residual()
    randomise(network, seed=1)
    network.to(dtype)
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    config = WormConfig(truncation={"frozen_weights": "hold"})
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    example = random_images(1).to(dtype)
    return worm_dist.attach(model, optimizer, config, example_inputs=example)


def _network(engine: Engine) -> nn.Module:
    network = getattr(engine.model, "module", engine.model)
    assert isinstance(network, nn.Module)
    return network


def _gradients(model: nn.Module, images: Tensor, autocast: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(images).float().square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _packed_and_by_hand(autocast: bool, dtype: torch.dtype) -> tuple[bool, int, int]:
    engine = _engine(dtype)
    mask = mask_dropping(engine.groups, *DROPPED)
    engine.truncate(mask)
    network = _network(engine)
    images = random_images(4, seed=dist.get_rank()).to(dtype)
    expected = _gradients(network, images, autocast)
    plan = FreezePlan(network, engine.groups, ~mask.keep, "producer")
    for parameter, gradient in zip(network.parameters(), expected):
        gradient.mul_(1 / dist.get_world_size())
        dist.all_reduce(gradient)
        if parameter in plan.blocks:
            for dim, places in plan.blocks[parameter].frozen.items():
                gradient.index_fill_(dim, places, 0)
    gradients = _gradients(engine.model, images, autocast)
    engine.optimizer.step()
    equal = all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))
    return equal, engine.traffic.sent_bytes, plan.num_live(network.parameters()) * dtype.itemsize


@pytest.mark.parametrize(
    ("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16), (False, torch.float64)]
)
def test_live_gradients_are_exact_in_every_precision(
    ranks: Ranks, autocast: bool, dtype: torch.dtype
) -> None:
    for equal, sent, live in ranks(2, _packed_and_by_hand, autocast, dtype):
        assert equal
        assert sent == live


def _scaled_steps(where: str) -> tuple[list[float], list[bool], list[Tensor]]:
    """Loss scales and whether weights moved, step by step; rank 1's second loss overflows."""
    engine = _engine()
    engine.truncate(mask_dropping(engine.groups, *DROPPED))
    network = _network(engine)
    assert isinstance(network, Residual)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    # Channel 0 of the stem is frozen, channel 1 is not.
    channel = {"frozen": 0, "live": 1}[where]
    poisoned = dist.get_rank() == 1

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[channel] = torch.inf
        return gradient

    scales, moved = [], []
    for step in range(4):
        handle = network.stem.weight.register_hook(poison) if poisoned and step == 1 else None
        before = network.head.weight.detach().clone()
        engine.optimizer.zero_grad()
        loss = engine.model(random_images(4, seed=10 * step + dist.get_rank())).square().mean()
        scaler.scale(loss).backward()
        scaler.step(engine.optimizer)
        scaler.update()
        if handle is not None:
            handle.remove()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, network.head.weight))
    return scales, moved, [p.detach().clone() for p in network.parameters()]


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: Ranks) -> None:
    """The scaler looks at what was averaged; where it skips, all ranks must."""
    (scales, moved, weights), other = ranks(2, _scaled_steps, "live")
    assert scales == [256.0, 128.0, 128.0, 128.0]
    assert moved == [True, False, True, True]
    assert (scales, moved) == other[:2]
    assert all(torch.equal(a, b) for a, b in zip(weights, other[2], strict=True))


def test_an_overflow_in_a_frozen_slice_is_nobodys_business(ranks: Ranks) -> None:
    (scales, moved, weights), other = ranks(2, _scaled_steps, "frozen")
    assert scales == [256.0] * 4 and all(moved)
    assert (scales, moved) == other[:2]
    assert all(torch.equal(a, b) for a, b in zip(weights, other[2], strict=True))
    assert all(bool(weight.isfinite().all()) for weight in weights)


def _averaged() -> tuple[Any, ...]:
    engine = _engine()
    network = _network(engine)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    mask = mask_dropping(engine.groups, *DROPPED)

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            images = random_images(4, seed=engine.step)
            engine.optimizer.zero_grad()
            engine.model(images).square().mean().backward()
            engine.optimizer.step()
            ema.update_parameters(network)

    engine.truncate(mask)
    train(3)
    before = {name: p.detach().clone() for name, p in ema.module.named_parameters()}
    with pytest.raises(ConfigError, match=r"copies\[0\] is not a copy"):
        engine.draw(mask, copies=[Plain()])
    engine.draw(mask, copies=[ema.module])
    kept = mask["stem"]
    carried = torch.equal(ema.module.get_parameter("stem.weight"), before["stem.weight"][kept])
    ema.module.eval()
    finite = bool(ema.module(random_images(2)).isfinite().all())
    train(2)
    shapes = [p.shape for p in network.parameters()], [p.shape for p in ema.module.parameters()]
    return carried, finite, shapes


@pytest.mark.parametrize("world_size", [NO_GROUP, 2])
def test_averaged_weights_follow_a_draw(ranks: Ranks, world_size: int) -> None:
    """An EMA that keeps the old shapes fails at its next update."""
    for carried, finite, (shapes, averaged) in ranks(world_size, _averaged):
        assert carried and finite
        assert shapes == averaged
