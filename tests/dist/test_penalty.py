"""The penalty meets what users train with: layers that a pass leaves out, scaled losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from worm_dist import WormConfig

L1 = 0.01


class _Skipping(Residual):
    """A residual branch that a pass may leave out, as stochastic depth does."""

    skips = False

    def forward(self, images: Tensor) -> Tensor:
        if not self.skips:
            return super().forward(images)
        features = torch.relu(self.bn0(self.stem(images)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def _train_skipping() -> tuple[list[bool], bool, list[Tensor]]:
    """Whether the branch's scale had a gradient, step by step; the last step's gradients are right;
    the weights."""
    torch.manual_seed(0)
    network = _Skipping()
    randomise(network, seed=1)
    model = DistributedDataParallel(network, find_unused_parameters=True)
    config = WormConfig(search={"l1": L1}, truncation={"frozen_weights": "hold"})
    optimizer = SGD(model.parameters(), lr=0.1)
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    engine.truncate(mask_dropping(engine.groups, 0))
    had = []
    for step in range(4):
        network.skips = step % 2 == 1
        images = random_images(4, seed=10 * step + dist.get_rank())
        engine.optimizer.zero_grad()
        (engine.model(images).square().mean() + engine.penalty()).backward()
        gradient = network.bn1.weight.grad
        had.append(gradient is not None and bool(gradient.any()))
        seen = network.bn0.weight.grad
        assert seen is not None
        gradients = seen.clone()
        if step < 3:
            engine.optimizer.step()
    # By hand: rank's own gradient with the penalty's, averaged, frozen ones zero.
    network.zero_grad()
    loss = network(images).square().mean() + L1 * network.bn0.weight.abs().sum()
    loss.backward()
    assert network.bn0.weight.grad is not None
    expected = network.bn0.weight.grad.mul_(1 / dist.get_world_size())
    dist.all_reduce(expected)
    assert engine.mask is not None
    frozen = engine.groups.split(~engine.mask.keep)["stem"]
    expected[frozen] = 0
    weights = [p.detach().clone() for p in network.parameters()]
    return had, torch.allclose(gradients, expected, rtol=1e-6, atol=1e-9), weights


def test_a_norm_that_a_pass_leaves_out_is_left_out_of_the_penalty(ranks: Ranks) -> None:
    """DDP takes unused parameters for done before the backward pass; a penalty on all norms handed
    them a gradient after all, and torch raised "Expected to mark a variable ready only once"."""
    (had, right, weights), (_, _, others) = ranks(2, _train_skipping)
    assert had == [True, False, True, False]
    assert right
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def _train_scaled(fused: bool) -> list[Tensor]:
    torch.manual_seed(0)
    network: nn.Module = Residual()
    randomise(network, seed=1)
    optimizer = SGD(network.parameters(), lr=0.1, fused=fused)
    config = WormConfig(search={"l1": L1}, truncation={"frozen_weights": "free"})
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    engine.truncate(mask_dropping(engine.groups, 0, 3, 9))
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        engine.optimizer.zero_grad()
        loss = engine.model(random_images(4, seed=step)).square().mean() + engine.penalty()
        scaler.scale(loss).backward()
        scaler.step(engine.optimizer)
        scaler.update()
    return [p.detach().clone() for p in network.parameters()]


def test_a_fused_optimizer_divides_the_penalty_of_frozen_scales_too(ranks: Ranks) -> None:
    """A fused optimizer is given scaled gradients; the penalty that frozen scales get just before
    the step was added as it is, and came out a thousand times too small."""
    (fused,), (plain,) = (ranks(NO_GROUP, _train_scaled, fused) for fused in (True, False))
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class _TestsMore(nn.Module):
    """Trains one half of itself and tests both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Plain(), Plain()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.one(images)
        return logits if self.training else logits + self.other(images)


def _train_and_test() -> int:
    model = DistributedDataParallel(_TestsMore(), find_unused_parameters=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    engine = worm_dist.attach(model, optimizer, WormConfig(), example_inputs=random_images(1))
    for seed in range(3):
        model.eval()
        with torch.no_grad():
            model.module(random_images(2))
        model.train()
        optimizer.zero_grad()
        (engine.model(random_images(4, seed=seed)).square().mean() + engine.penalty()).backward()
        optimizer.step()
    return engine.step


def test_a_norm_that_only_tests_use_is_left_out_of_the_penalty(ranks: Ranks) -> None:
    """What a test pass had used went into the next penalty, and DDP died of a parameter that was
    "ready only once": it had taken it for unused."""
    assert ranks(2, _train_and_test) == [3, 3]
