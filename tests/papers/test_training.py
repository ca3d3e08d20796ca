"""Whole searches under ``early-bird`` and ``worm-paper``, on one rank and on two: the weights are
bit for bit those of a plain loop that is written from the papers' equations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.papers.nets import NETS, build
from tests.papers.published import Queue, batch_norms, early_bird_mask
from tests.ranks import Ranks
from tests.resuming import through_a_file
from worm_dist import Engine, Phase, WormConfig, attach
from worm_dist.presets import merge

EPOCHS, STEPS, BATCH = 9, 3, 8
RATIO, WINDOW, MARGIN = 0.003, 3, 0.4
NEAR = 0.12
"""A mean distance."""
L1 = 1e-3


def _batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's batch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 * step + rank)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (BATCH,), generator=generator)


_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "worm-paper": ({}, {}),
    "constant": ({"elbow": {"min_masks": 1}}, {"ratio": 0.1}),
    "greedy": ({"elbow": {"margin": 1.0}}, {"ratio": "distance"}),
    "two phases": (
        {"elbow": {"margin": 1.0}},
        {"ratio": "distance", "near_distance": NEAR, "near_ratio": 0.01},
    ),
}
"""The published rule, and its authors' variants: a constant factor from the first mask on, the mean
distance as the factor, and that until it is small (BERT).  Each with its changes to ``search`` and
``truncation``."""


@dataclass
class _Published:
    """The published loop.

    Attributes:
        network: the network, trained.
        truncated_epochs: number of epochs whose gradients were truncated.
        differs: whether, in one of them, norms that a sum ties had different masks.
        factors: of every epoch.
        momentum: by name of each parameter, at the end.
    """

    network: nn.Module
    truncated_epochs: int = 0
    differs: bool = False
    factors: list[float] = field(default_factory=list)
    momentum: dict[str, Tensor] = field(default_factory=dict)

    def train(self, l1: float, variant: str | None) -> None:
        network, queue, factor = self.network, Queue(WINDOW), 1.0
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        network.train()
        for epoch in range(EPOCHS):
            mask = early_bird_mask(network, 0.5)
            queue.put(mask)
            if variant == "constant":
                factor = 0.1
            elif variant in ("greedy", "two phases") and queue.is_full:
                factor = sum(queue.distances) / (WINDOW - 1)
                if variant == "two phases" and queue.is_elbow("0", str(NEAR)):
                    factor = 0.01
            elif variant == "worm-paper" and queue.is_elbow("1e-9", str(MARGIN)):
                factor = RATIO
            self.factors.append(factor)
            self.truncated_epochs += factor != 1
            self.differs |= factor != 1 and _ties_differ(mask)
            for step in range(epoch * STEPS, (epoch + 1) * STEPS):
                images, classes = _batch(step)
                nn.functional.cross_entropy(network(images), classes).backward()
                for name, norm in batch_norms(network).items():
                    assert norm.weight.grad is not None and norm.bias.grad is not None
                    norm.weight.grad += l1 * norm.weight.detach().sign()
                    if factor != 1:
                        for gradient in (norm.weight.grad, norm.bias.grad):
                            gradient[~mask[name]] *= factor
                _average(network)
                optimizer.step()
                optimizer.zero_grad()
        self.momentum = _momentum(network, optimizer)


def _momentum(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """It shows the last bits of gradients that are too small to change weights."""
    return {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in network.named_parameters()
    }


def _ties_differ(mask: dict[str, Tensor]) -> bool:
    tied = [mask[name] for name in ("bn1", "stages.0.0.bn2") if name in mask]
    return len(tied) == 2 and not torch.equal(*tied)


def _average(network: nn.Module) -> None:
    if not dist.is_initialized():
        return
    for parameter in network.parameters():
        assert parameter.grad is not None
        parameter.grad /= dist.get_world_size()
        dist.all_reduce(parameter.grad)


def _attached(network: nn.Module, variant: str | None) -> Engine:
    """Without a variant, nothing is truncated."""
    search: dict[str, Any] = {"window": WINDOW, "settled": 1e-9, "elbow": {"margin": MARGIN}}
    if variant is None:
        config = WormConfig.preset("early-bird", search={**search, "l1": L1})
    else:
        changes, truncation = _VARIANTS[variant]
        search = merge(search, changes)
        config = WormConfig.preset("worm-paper", search=search, truncation=truncation)
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = torch.zeros(1, 1, 8, 8)
    return attach(model, optimizer, config, example_inputs=inputs, steps_per_epoch=STEPS)


def _train(kind: str, variant: str | None, resumed_at: int | None = None) -> dict[str, Any]:
    """Train by the package, perhaps broken off and resumed at a step, and by the published loop."""
    network = build(kind, 1)
    engine = _attached(network, variant)
    assert engine.is_due
    elbows = [engine.check().elbow]
    for step in range(EPOCHS * STEPS):
        if step == resumed_at:
            parts = engine.state_dict(), network.state_dict(), engine.optimizer.state_dict()
            of_engine, weights, of_optimizer = through_a_file(parts)
            network = build(kind, 7)
            engine = _attached(network, variant)
            engine.load_state_dict(of_engine)
            network.load_state_dict(weights)
            engine.optimizer.load_state_dict(of_optimizer)
        images, classes = _batch(step)
        loss = nn.functional.cross_entropy(engine.model(images), classes)
        (loss + engine.penalty()).backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        if step + 1 < EPOCHS * STEPS:
            elbows.append(engine.check().elbow)
    published = _Published(build(kind, 1))
    published.train(L1 if variant is None else 0.0, variant)
    theirs = dict(published.network.named_parameters())
    momentum = _momentum(network, engine.optimizer)
    wrong = [
        name
        for name, ours in network.named_parameters()
        if not torch.equal(ours, theirs[name])
        or not torch.equal(momentum[name], published.momentum[name])
    ]
    return {
        "wrong": wrong,
        "phase": engine.phase,
        "elbows": sum(elbows),
        "truncated": published.truncated_epochs,
        "factors": published.factors,
        "differs": published.differs,
    }


@pytest.mark.parametrize("world_size", [0, 1, 2])
@pytest.mark.parametrize("kind", NETS)
def test_worm_paper_is_the_published_loop(ranks: Ranks, kind: str, world_size: int) -> None:
    for result in ranks(world_size, _train, kind, "worm-paper"):
        assert result["wrong"] == []
        assert result["phase"] is Phase.TRUNCATE and result["elbows"] == 1
        assert result["truncated"] >= 3
        assert result["differs"] == (kind == "resnet")


@pytest.mark.parametrize("variant", ["constant", "greedy", "two phases"])
def test_variants_are_the_published_loops(ranks: Ranks, variant: str) -> None:
    for result in ranks(2, _train, "resnet", variant):
        assert result["wrong"] == []
        assert result["phase"] is Phase.TRUNCATE and result["elbows"] == 1
        assert result["truncated"] >= 3 and result["differs"]
        has_followed = any(factor not in (1, 0.01) for factor in result["factors"])
        assert variant != "two phases" or (has_followed and 0.01 in result["factors"])


@pytest.mark.parametrize("variant", ["worm-paper", "greedy"])
def test_resumed_within_a_truncated_epoch_it_is_the_same(ranks: Ranks, variant: str) -> None:
    for result in ranks(2, _train, "resnet", variant, 4 * STEPS + 1):
        assert result["wrong"] == [] and result["phase"] is Phase.TRUNCATE


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", NETS)
def test_early_bird_is_the_published_loop(ranks: Ranks, kind: str, world_size: int) -> None:
    for result in ranks(world_size, _train, kind, None):
        assert result["wrong"] == []
        assert result["phase"] is Phase.SEARCH and result["elbows"] == 0


@torch.no_grad()
def _slice(network: nn.Module, mask: dict[str, Tensor]) -> None:
    """The published surgery of a chain: plain slices of what the masks keep."""
    columns: Tensor | None = None
    convolution: nn.Conv2d | None = None
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
            if columns is not None:
                module.weight.data = module.weight[:, columns]
        elif isinstance(module, nn.BatchNorm2d):
            assert convolution is not None
            columns = mask[name]
            convolution.weight.data = convolution.weight[columns]
            for tensor in (module.weight, module.bias):
                tensor.data = tensor[columns]
            for statistic in ("running_mean", "running_var"):
                setattr(module, statistic, module.get_buffer(statistic)[columns])
        elif isinstance(module, nn.Linear):
            assert columns is not None
            module.weight.data = module.weight[:, columns]


def _retrain() -> list[str]:
    """Draw the first mask and train the ticket with the L1 penalty; the parameters that differ
    from those of the published surgery and loop."""
    network, published = build("vgg", 1), build("vgg", 1)
    for norm, other in zip(batch_norms(network).values(), batch_norms(published).values()):
        generator = torch.Generator().manual_seed(norm.num_features)
        norm.weight.data.uniform_(generator=generator)
        other.weight.data.copy_(norm.weight)
    config = WormConfig.preset("early-bird", search={"window": 1, "l1": L1})
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = torch.zeros(1, 1, 8, 8)
    engine = attach(model, optimizer, config, example_inputs=inputs, steps_per_epoch=STEPS)
    assert engine.check().ticket
    engine.draw()
    _slice(published, early_bird_mask(published, 0.5))
    their_optimizer = torch.optim.SGD(published.parameters(), lr=0.05, momentum=0.9)
    for step in range(2 * STEPS):
        images, classes = _batch(step)
        loss = nn.functional.cross_entropy(engine.model(images), classes)
        (loss + engine.penalty()).backward()
        nn.functional.cross_entropy(published(images), classes).backward()
        for norm in batch_norms(published).values():
            assert norm.weight.grad is not None
            norm.weight.grad += L1 * norm.weight.detach().sign()
        _average(published)
        for each in (engine.optimizer, their_optimizer):
            each.step()
            each.zero_grad()
    ours = dict(network.named_parameters())
    theirs = dict(published.named_parameters())
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("world_size", [0, 2])
def test_the_ticket_is_drawn_and_retrained_as_published(ranks: Ranks, world_size: int) -> None:
    for wrong in ranks(world_size, _retrain):
        assert wrong == []
