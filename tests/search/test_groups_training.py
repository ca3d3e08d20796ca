"""Parts of a network that run only while it trains read its channels too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import worm_dist
from tests.nets import random_images
from tests.oracles import mask_dropping
from worm_dist import WormConfig
from worm_dist.pruning.exactness import find_drawable_groups


class _Assisted(nn.Module):
    """An auxiliary head helps while the network trains, as in GoogLeNet."""

    def __init__(self, assist: Callable[[_Assisted, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        self.aux = nn.Conv2d(8, 4, 1)
        self.aux_bn = nn.BatchNorm2d(4)
        self.aux_head = nn.Linear(4, 5)
        self.dropout = nn.Dropout(0.5)
        self._assist = assist or _Assisted.auxiliary

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = torch.relu(self.bn1(self.conv1(images)))
        outer = torch.relu(self.bn2(self.conv2(features)))
        logits: Tensor = self.head(outer.mean(dim=(2, 3)))
        return (logits, self._assist(self, features)) if self.training else logits

    def auxiliary(self, features: Tensor) -> Tensor:
        pooled = torch.relu(self.aux_bn(self.aux(features))).mean(dim=(2, 3))
        logits: Tensor = self.aux_head(self.dropout(pooled))
        return logits


def test_an_auxiliary_head_loses_its_inputs_with_the_others() -> None:
    """Only eval mode was looked at: after a draw the first step of training failed."""
    network = _Assisted()
    optimizer = SGD(network.parameters(), lr=0.1)
    config = WormConfig(ticket={"recalibrate_batches": 0})
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(2))
    assert engine.groups.sizes == {"conv1": 8, "conv2": 6, "aux": 4}
    readers = [member.module for member in engine.groups[0].consumers]
    assert readers == ["conv2", "aux"]
    engine.draw(mask_dropping(engine.groups, 0, 5, 9, 15))
    assert network.aux.weight.shape == (3, 6, 1, 1)
    logits, assisting = network(random_images(4))
    (logits.sum() + assisting.sum()).backward()
    optimizer.step()


def _noisy(network: _Assisted, features: Tensor) -> Tensor:
    return network.auxiliary(F.dropout(features, 0.5, network.training))


def _narrow(network: _Assisted, features: Tensor) -> Tensor:
    return network.auxiliary(features[:, :8].reshape(-1, 8, 8, 8))


def test_noise_is_not_taken_for_a_difference() -> None:
    groups = find_drawable_groups(_Assisted(_noisy), random_images(2))
    assert groups.sizes == {"conv1": 8, "conv2": 6, "aux": 4}


def test_what_breaks_only_in_training_mode_stays_dense() -> None:
    groups = find_drawable_groups(_Assisted(_narrow), random_images(2))
    assert groups.sizes == {"conv2": 6, "aux": 4}
    assert groups.dense["bn1"].startswith("without some of its channels the network fails")


def _demanding(network: _Assisted, features: Tensor) -> Tensor:
    raise ValueError("in training mode targets are needed")


def test_a_network_that_cannot_train_on_the_example_is_looked_at_in_eval_mode() -> None:
    groups = find_drawable_groups(_Assisted(_demanding), random_images(2))
    assert groups.sizes == {"conv2": 6}
    assert groups.dense == {
        "bn1": "aux, which the example inputs do not reach, is 8 wide too and may use its "
        "channels; give inputs that reach it",
        "aux_bn": "no prunable layer produces its channels",
        "aux": "it is never called, or not as a module",
        "aux_head": "it is never called, or not as a module",
    }


@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_statistics_and_modes_alone(training: bool) -> None:
    network = _Assisted().train(training)
    network.bn2.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = {name: module.training for name, module in network.named_modules()}
    find_drawable_groups(network, random_images(2))
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
