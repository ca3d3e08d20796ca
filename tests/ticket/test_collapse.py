"""A network whose output no longer depends on its input is told, with the layers that died."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import CollapseError, Engine, WormConfig


def _engine(network: nn.Module, images: Tensor) -> Engine:
    randomise(network, seed=1)
    model: Any = DistributedDataParallel(network) if dist.is_initialized() else network
    config = WormConfig(
        search={"l1": 0.0},
        truncation={"removal": {"duration": "40ba", "fade_steps": 1}},
        ticket={"recalibrate_batches": 3},
    )
    engine = worm_dist.attach(
        model,
        SGD(model.parameters(), lr=1e-4),
        config,
        example_inputs=images[:1],
        steps_per_epoch=1,
    )
    engine.truncate(mask_dropping(engine.groups, 0, 1))
    return engine


def _step(engine: Engine, images: Tensor) -> None:
    engine.optimizer.zero_grad()
    engine.model(images).square().mean().backward()
    engine.optimizer.step()


@torch.no_grad()
def _kill(norm: Any) -> None:
    """Nothing that reaches the rectifier behind it is above zero any more."""
    norm.bias.fill_(-1e4)


def _dead_on_two_ranks() -> str:
    network = Plain()
    rank = dist.get_rank()
    engine = _engine(network, random_images(4, seed=rank))
    for number in range(3):
        _step(engine, random_images(4, seed=10 * number + rank))
    engine.check()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    _kill(norms[-1])
    _step(engine, random_images(4, seed=rank))
    with pytest.raises(CollapseError) as caught:
        engine.check()
    return str(caught.value)


def test_a_dead_network_is_told_on_every_rank(ranks: Ranks) -> None:
    one, other = ranks(2, _dead_on_two_ranks)
    assert one == other
    assert one.startswith("check at step 4: the network's output no longer depends on its input.")
    assert "Nothing but zeros comes from conv2." in one
    assert "lower learning rate" in one
    assert CollapseError.exit_code == 7


def test_a_dead_branch_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """The network goes on around it."""
    network = Residual()
    engine = _engine(network, random_images(4))
    _kill(network.bn1)
    with caplog.at_level(logging.WARNING, logger="worm_dist"):
        for number in range(3):
            _step(engine, random_images(4, seed=number))
            engine.check()
    (record,) = caplog.records
    assert "check at step 1: the remaining channels of" in record.getMessage()
    assert "of conv1 are all zero;" in record.getMessage()


@pytest.mark.parametrize("batch", [1, 4])
def test_the_same_input_again_and_again_says_nothing(batch: int) -> None:
    """Someone who tries whether a network can learn one image by heart has not lost it."""
    network = Residual()
    image = random_images(1).expand(batch, -1, -1, -1).clone()
    engine = _engine(network, image)
    for _ in range(3):
        _step(engine, image)
        engine.check()
    _kill(network.bn0)
    _kill(network.bn2)
    _step(engine, image)
    engine.check()


class _Losing(nn.Module):
    """Puts out its loss alone, as some do in training."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Residual()

    def forward(self, images: Tensor) -> Any:
        logits = self.network(images)
        return {"loss": logits.square().mean()} if self.training else {"logits": logits}


def test_outputs_may_be_of_any_form() -> None:
    network = _Losing()
    engine = _engine(network, random_images(4))
    for number in range(2):
        engine.optimizer.zero_grad()
        engine.model(random_images(4, seed=number))["loss"].backward()
        engine.optimizer.step()
        engine.check()
    engine.optimizer.zero_grad()
    engine.optimizer.step()
    _kill(network.network.bn0)
    _kill(network.network.bn2)
    with pytest.raises(CollapseError, match=r"comes from network\.stem"):
        engine.check()
