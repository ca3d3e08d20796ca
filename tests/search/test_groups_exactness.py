"""Channels that cannot be removed without changing what the network computes stay dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nets import Plain, Residual, random_images
from worm_dist import ConfigError
from worm_dist.pruning.exactness import find_drawable_groups as find_groups


class _Net(nn.Module):
    """A sound group ``conv1``, and behind it whatever the test is about."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, images: Tensor) -> Tensor:
        return self._forward(self, torch.relu(self.bn1(self.conv1(images))))


def _norm_makes_the_output() -> nn.Module:
    """The channels of conv2 are the classes."""
    return _Net(
        lambda net, x: net.bn2(net.conv2(x)).mean((2, 3)),
        conv2=nn.Conv2d(6, 10, 1),
        bn2=nn.BatchNorm2d(10),
    )


def _sum_with_a_branch_without_norm() -> nn.Module:
    """Zero scale and shift of bn2 do not silence a channel of conv3."""
    return _Net(
        lambda net, x: net.head(torch.relu(net.bn2(net.conv2(x)) + net.conv3(x))),
        conv2=nn.Conv2d(6, 8, 1),
        bn2=nn.BatchNorm2d(8),
        conv3=nn.Conv2d(6, 8, 1),
        head=nn.Conv2d(8, 4, 1),
    )


def _sigmoid() -> nn.Module:
    """sigmoid(0) is a half: what is dropped was not silent."""
    return _Net(
        lambda net, x: net.head(torch.sigmoid(net.bn2(net.conv2(x)))),
        conv2=nn.Conv2d(6, 8, 1),
        bn2=nn.BatchNorm2d(8),
        head=nn.Conv2d(8, 4, 1),
    )


def _two_inputs_for_each_output() -> nn.Module:
    """groups == out_channels, but not depthwise: conv2's channels come in pairs."""
    return _Net(
        lambda net, x: net.head(torch.relu(net.grouped(torch.relu(net.bn2(net.conv2(x)))))),
        conv2=nn.Conv2d(6, 8, 1),
        bn2=nn.BatchNorm2d(8),
        grouped=nn.Conv2d(8, 4, 1, groups=4),
        head=nn.Conv2d(4, 4, 1),
    )


def _no_scale_at_all() -> nn.Module:
    return _Net(
        lambda net, x: net.head(torch.relu(net.bn2(net.conv2(x)))),
        conv2=nn.Conv2d(6, 8, 1),
        bn2=nn.BatchNorm2d(8, affine=False),
        head=nn.Conv2d(8, 4, 1),
    )


@pytest.mark.parametrize(
    "build",
    [
        _norm_makes_the_output,
        _sum_with_a_branch_without_norm,
        _sigmoid,
        _two_inputs_for_each_output,
        _no_scale_at_all,
    ],
)
def test_is_left_dense_with_a_reason(build: Callable[[], nn.Module]) -> None:
    groups = find_groups(build(), random_images(1))
    assert [group.name for group in groups] == ["conv1"]
    assert groups.dense.keys() == {"bn2"} and groups.dense["bn2"]


class _AddedToTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Conv2d(3, 10, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images + self.bn(self.conv(images)))
        return logits


def test_channels_added_to_the_networks_input_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no channel group of which(.|\n)*bn: "):
        find_groups(_AddedToTheInput(), random_images(1))


def test_a_norm_of_the_input_is_named_among_the_dense() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), Plain())
    assert find_groups(network, random_images(1)).dense.keys() == {"0"}


def test_frozen_layers_are_seen_by_the_tracer() -> None:
    """Without gradients there was no graph: conv1 and bn1 vanished, though bn1 trains."""
    network = Plain()
    network.conv1.requires_grad_(False)
    assert [group.name for group in find_groups(network, random_images(1))] == ["conv1", "conv2"]
    assert not network.conv1.weight.requires_grad


def test_a_frozen_stem_is_still_tied_by_the_residual_sum() -> None:
    network = Residual()
    network.stem.requires_grad_(False)
    tied, _ = find_groups(network, random_images(1))
    assert [m.module for m in tied.members if m.role == "producer"] == ["stem", "conv2"]


def test_a_failed_trace_leaves_the_network_as_it_was() -> None:
    network = Plain()
    network.bn1.eval()
    modes = {name: m.training for name, m in network.named_modules()}
    with pytest.raises(ConfigError):
        find_groups(network, random_images(1, channels=5))
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


class _TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = torch.relu(self.bn(self.conv(images)))
        return self.plain(images), features, self.head(features)


def test_features_that_are_put_out_besides_being_read_stay_dense() -> None:
    groups = find_groups(_TwoOutputs(), random_images(1))
    assert [group.name for group in groups] == ["plain.conv1", "plain.conv2"]
    assert groups.dense.keys() == {"bn"}
