"""Blocks that are computed again in the backward pass: their gradients are truncated and averaged
as all others are, and the network is drawn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import worm_dist
from tests.nets import random_images, randomise
from tests.oracles import live_flags, mask_dropping, zero_frozen
from tests.ranks import NO_GROUP, Ranks
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("trains checkpointed blocks on real ranks")

_DROPPED = (0, 3, 9, 11, 17)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


class _Checkpointed(nn.Module):
    """Two of three blocks are computed again.

    Args:
        how: "reentrant", "guarded" so that it happens only in training, "sequential", "saved" for
            torch's newer way, or "plain" for none.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = _block(3, 8), _block(8, 6), _block(6, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.a(images)
        if self.how == "plain" or (self.how == "guarded" and not self.training):
            features = self.c(self.b(features))
        elif self.how == "sequential":
            blocks = nn.Sequential(*self.b, *self.c)
            features = checkpoint_sequential(blocks, 2, features, use_reentrant=True)
        else:
            for block in (self.b, self.c):
                features = checkpoint(block, features, use_reentrant=self.how != "saved")
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _wrapped(network: nn.Module, **arguments: Any) -> nn.Module:
    return DistributedDataParallel(network, **arguments) if dist.is_initialized() else network


def _made(how: str) -> nn.Module:
    torch.manual_seed(0)
    network = _Checkpointed(how).double()
    randomise(network, seed=3)
    return network


def _images(step: int) -> Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return random_images(6, seed=2 * step + rank).double()


def _gradients(model: nn.Module, network: nn.Module, step: int) -> dict[str, Tensor]:
    network.zero_grad()
    model(_images(step)).square().mean().backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def _trained(how: str, arguments: dict[str, Any]) -> list[str]:
    """What is wrong with gradients: of the dense, the truncated and the drawn network."""
    # In a test nothing has to be computed again, and torch says so.
    warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
    network, reference = _made(how), _made("plain")
    model, plain = _wrapped(network, **arguments), _wrapped(reference)
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
    engine = worm_dist.attach(
        model,
        optimizer,
        WormConfig(
            truncation={"frozen_weights": "hold"},
            search={"l1": 0.0},
            ticket={"recalibrate_batches": 0},
        ),
        example_inputs=_images(99),
        steps_per_epoch=10,
    )
    wrong = [] if len(engine.groups) == 3 else [f"groups {engine.groups.sizes}"]
    mask = mask_dropping(engine.groups, *_DROPPED)
    flags = live_flags(network, engine.groups, ~mask.keep, "producer")
    for step in range(6):
        if step == 3:
            engine.truncate(mask)
        reference.load_state_dict(network.state_dict())
        expected = _gradients(plain, reference, step)
        if step >= 3:
            zero_frozen(reference, flags)
            expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        found = _gradients(engine.model, network, step)
        wrong += _differences(expected, found, f"step {step}")
        optimizer.step()
    if dist.is_initialized() and not engine.traffic.sent_bytes < engine.traffic.dense_bytes:
        wrong.append("frozen slices are sent")
    engine.draw(mask)
    small = _made("plain")
    assert isinstance(small, _Checkpointed) and isinstance(network, _Checkpointed)
    for name in "abc":
        outputs, inputs = network.get_parameter(f"{name}.0.weight").shape[:2]
        small.add_module(name, _block(inputs, outputs))
    small.head = nn.Linear(network.head.in_features, 1)
    small.double().load_state_dict(network.state_dict())
    expected = _gradients(_wrapped(small), small, 7)
    wrong += _differences(expected, _gradients(engine.model, network, 7), "drawn")
    optimizer.step()
    if network.a[0].out_channels != 6:
        wrong.append("nothing was drawn")
    return wrong


def _differences(expected: dict[str, Tensor], found: dict[str, Tensor], where: str) -> list[str]:
    if expected.keys() != found.keys():
        return [f"{where}: gradients of other parameters"]
    # Buckets may be reduced in another order, but each sum is that of two numbers.
    return [
        f"{where}: {name} is off by {float((gradient - found[name]).abs().max())}"
        for name, gradient in expected.items()
        if not torch.equal(gradient, found[name])
    ]


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "": {},
    "static graph": {"static_graph": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "tiny buckets": {"bucket_cap_mb": 0.001},
}


@pytest.mark.parametrize("arguments", _ARGUMENTS.values(), ids=_ARGUMENTS)
@pytest.mark.parametrize("how", ["reentrant", "guarded", "sequential", "saved"])
def test_live_gradients_are_those_of_plain_ddp(
    ranks: Ranks, how: str, arguments: dict[str, Any]
) -> None:
    """Blocks that are computed again in eval mode too were taken for parts that cannot be traced,
    and nodes of the backward pass come in another order."""
    for wrong in ranks(2, _trained, how, arguments):
        assert wrong == []


@pytest.mark.parametrize("how", ["reentrant", "guarded", "sequential", "saved"])
def test_alone_they_are_those_of_the_plain_network(ranks: Ranks, how: str) -> None:
    (wrong,) = ranks(NO_GROUP, _trained, how, {})
    assert wrong == []
