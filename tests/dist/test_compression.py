"""Packing composes with rounding: live elements, two bytes each, before and after the draw.  A
collective that failed is told, however gradients are compressed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import ConfigError, Engine, WormConfig
from worm_dist.groups.freeze_plan import FreezePlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _engine(compression: str) -> Engine:
    torch.manual_seed(0)
    network: nn.Module = Residual()
    randomise(network, seed=1)
    model = DistributedDataParallel(network)
    config = WormConfig(truncation={"frozen_weights": "hold", "compression": compression})
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))


def _images(step: int) -> Tensor:
    return random_images(4, seed=10 * step + dist.get_rank())


def _gradients(model: nn.Module, step: int) -> list[Tensor]:
    model.zero_grad()
    model(_images(step)).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _reference(network: nn.Module, step: int, dtype: torch.dtype) -> list[Tensor]:
    """Each rank's own gradients, rounded, averaged by hand, one parameter at a time."""
    averaged = []
    for gradient in _gradients(network, step):
        rounded = (gradient / dist.get_world_size()).to(dtype)
        dist.all_reduce(rounded)
        averaged.append(rounded.float())
    return averaged


def _run(compression: str) -> list[tuple[bool, int, int, int]]:
    """For the search, two truncations and the ticket: bits equal; bytes sent, expected, dense."""
    engine = _engine(compression)
    network = engine.model.module
    assert isinstance(network, nn.Module)
    frozen = torch.zeros(engine.groups.num_channels, dtype=torch.bool)
    stages = []
    dropped = {"truncate": (0, 3, 9), "truncate more": (0, 3, 4, 9)}
    for stage in ("search", *dropped, "ticket"):
        if stage in dropped:
            mask = mask_dropping(engine.groups, *dropped[stage])
            frozen = ~mask.keep
            engine.truncate(mask)
        elif stage == "ticket":
            engine.draw(engine.mask)
        # BatchNorm's running statistics do not matter to gradients in training mode.
        expected = _reference(network, engine.step, DTYPES[compression])
        live = sum(p.numel() for p in network.parameters())
        if stage in dropped:
            plan = FreezePlan(network, engine.groups, frozen, "producer")
            live = plan.num_live(network.parameters())
            for parameter, gradient in zip(network.parameters(), expected):
                if parameter in plan.blocks:
                    for dim, places in plan.blocks[parameter].frozen.items():
                        gradient.index_fill_(dim, places, 0)
        gradients = _gradients(engine.model, engine.step)
        equal = all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))
        engine.optimizer.step()
        traffic = engine.traffic
        stages.append((equal, traffic.sent_bytes, 2 * live, traffic.dense_bytes))
    return stages


@pytest.mark.parametrize("compression", DTYPES)
def test_live_elements_cost_two_bytes_and_are_rounded_once(ranks: Ranks, compression: str) -> None:
    for stages in ranks(2, _run, compression):
        dense = 4 * sum(p.numel() for p in Residual().parameters())
        for equal, sent, expected, dense_bytes in stages:
            assert equal
            assert sent == expected
            assert dense_bytes == dense


@pytest.mark.parametrize("mode", ["soft", "off"])
def test_compression_without_packing_is_torchs_own(mode: Any) -> None:
    with pytest.raises(ConfigError, match=r"register torch's own communication hook$"):
        WormConfig(truncation={"mode": mode, "compression": "bf16"})
    with pytest.raises(
        ConfigError, match=r"compression 'powersgd' contradicts mode.*; choose mode"
    ):
        WormConfig(truncation={"mode": mode, "compression": "powersgd"})


def _other_rank_leaves(compression: str) -> None:
    network = Residual()
    # Without this the forward pass would notice first.
    model = DistributedDataParallel(network, forward_sync_buffers=False)
    config = WormConfig(truncation={"frozen_weights": "hold", "compression": compression})
    optimizer = SGD(model.parameters(), lr=0.05)
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    engine.truncate(mask_dropping(engine.groups, 0, 3, 9))
    for step in range(4):
        if step == 3 and dist.get_rank() == 1:
            os._exit(0)
        _gradients(engine.model, step)


@pytest.mark.parametrize("compression", ["none", *DTYPES, "powersgd"])
def test_a_failed_all_reduce_is_told(ranks: Ranks, compression: str) -> None:
    """What was packed was unpacked in a callback that never asked whether the all-reduce had gone
    well: with the other rank gone, training went on with gradients of its own."""
    here, _ = ranks.outcomes(2, _other_rank_leaves, compression)
    assert here.error in ("RuntimeError", "DistNetworkError"), here
    assert "Connection closed by peer" in here.text or "reset by peer" in here.text
