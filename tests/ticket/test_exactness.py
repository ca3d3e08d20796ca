"""The trial at attach: a group that could not always be drawn exactly stays dense, whatever the
weights happen to be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from tests.families.nets import Normless
from tests.nets import Plain, random_images
from tests.search.test_groups_training import _Assisted
from worm_dist import ConfigError, Mask
from worm_dist.config import SearchConfig
from worm_dist.groups.tracing import find_groups
from worm_dist.pruning import exactness
from worm_dist.pruning.exactness import find_drawable_groups
from worm_dist.pruning.rehearsal import Rehearsal

_Branch = Callable[[Tensor], Tensor]


class _Branching(nn.Module):
    """Something is done to the first of two layers that looks at all of its channels."""

    def __init__(self, branch: _Branch, width: int = 32) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 5)
        self.branch = branch

    def forward(self, images: Tensor) -> Tensor:
        features = self.branch(self.norm(self.first(images)))
        logits: Tensor = self.head(self.norm2(self.second(features)).relu().mean(dim=(2, 3)))
        return logits


def _topk(x: Tensor) -> Tensor:
    return x * x.topk(2, dim=1).values.sum(dim=1, keepdim=True)


_INEXACT: dict[str, _Branch] = {
    "maximum": lambda x: x * x.amax(1, keepdim=True).sigmoid(),
    "minimum": lambda x: x * x.amin(1, keepdim=True).sigmoid(),
    "all": lambda x: x * (x > 0).all(1, keepdim=True),
    "topk": _topk,
    "median": lambda x: x * x.median(1, keepdim=True).values,
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "norm": lambda x: x / (1 + x.norm(dim=1, keepdim=True) / x.shape[1]),
    "softmax": lambda x: x.softmax(1),
    "sorted": lambda x: x.sort(1).values,
    "shape > 2": lambda x: x if x.shape[1] > 2 else x.relu(),
    "shape > 5": lambda x: x if x.shape[1] > 5 else 2 * x,
    "shape odd": lambda x: x if x.shape[1] % 2 == 0 else -x,
    "first": lambda x: x * x[:, :1].sigmoid(),
    "cosine": lambda x: x + x.cos(),
    "roll": lambda x: x + x.roll(1, 1).relu(),
}
_EXACT: dict[str, _Branch] = {
    "nothing": lambda x: x,
    "relu": torch.relu,
    "maximum of relu": lambda x: x.relu() * x.relu().amax(1, keepdim=True).sigmoid(),
    "any": lambda x: x * (x < 0).any(1, keepdim=True),
    "sum": lambda x: x * x.sum(1, keepdim=True).sigmoid(),
    "norm": lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
    "largest pixel": lambda x: x * x.amax((2, 3), keepdim=True),
    "double": lambda x: 2 * x if x.shape[1] > 2 else x + x,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", _INEXACT)
def test_a_look_at_all_channels_is_found_whatever_the_weights(name: str, seed: int) -> None:
    """Eight of twelve seeds once hid that a maximum is not that of the channels that are left."""
    torch.manual_seed(seed)
    network = _Branching(_INEXACT[name])
    if seed == 3:
        nn.init.ones_(network.norm.bias)  # as after training
    groups = find_drawable_groups(network, torch.randn(2, 3, 8, 8), SearchConfig())
    assert groups.sizes == {"second": 10}
    assert groups.dense["norm"].startswith("without some of its channels the network")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", _EXACT)
def test_what_zeros_do_not_change_is_drawn(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    network = _Branching(_EXACT[name])
    groups = find_drawable_groups(network, torch.randn(2, 3, 8, 8), SearchConfig())
    assert groups.sizes == {"first": 32, "second": 10}


def test_an_input_of_zeros_hides_nothing() -> None:
    network = _Branching(_INEXACT["maximum"])
    assert find_drawable_groups(network, torch.zeros(1, 3, 8, 8)).sizes == {"second": 10}


class _OnRequest(nn.Module):
    """Norms, a branch and experts, of which the example inputs reach some."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)
        self.other: nn.Module
        if kind == "norm":
            self.other = nn.BatchNorm2d(16)
        elif kind == "norm without scale":
            self.other = nn.BatchNorm2d(16, affine=False)
        elif kind == "layer":
            self.other = nn.Conv2d(16, 4, 1)
        elif kind == "sum":
            self.other = nn.Conv2d(3, 16, 1)
        elif kind == "experts":
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)) for _ in range(3)
            )

    def forward(self, images: Tensor, other: bool = False) -> Tensor:
        features = self.conv(images)
        features = (self.other if other and "norm" in self.kind else self.norm)(features).relu()
        if other and self.kind == "layer":
            features = features * self.other(features).mean().sigmoid()
        if other and self.kind == "sum":
            features = features + self.other(images)
        if self.kind == "experts":
            features = features + self.experts[int(images.mean() > 0) + other](features)
        logits: Tensor = self.head(self.norm2(self.second(features)).relu().mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("kind", ["norm", "norm without scale", "layer", "sum", "experts"])
def test_what_the_example_does_not_reach_keeps_its_channels(kind: str) -> None:
    """They were cut around it, and it failed when it was called for the first time."""
    groups = find_drawable_groups(_OnRequest(kind), random_images(2))
    assert groups.sizes == {"second": 12}
    assert "which the example inputs do not reach" in groups.dense["norm"]
    assert "give inputs that reach it" in groups.dense["norm"]


def test_with_an_example_that_reaches_all_nothing_stays_dense() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _OnRequest("norm")

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images) + self.network(images, other=True)
            return logits

    assert find_drawable_groups(Both(), random_images(2)).num_channels == 16 + 12


@pytest.mark.parametrize("width", range(4, 9))
def test_a_first_channel_that_becomes_the_last_is_found(width: int) -> None:
    """It is no difference where only one channel is left, or where only others go."""
    network = _Branching(lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=1), width)
    assert find_drawable_groups(network, random_images(1)).sizes == {"second": 10}


class _Hiding(_Branching):
    """Nothing of what the second layer puts out passes a threshold."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.branch(self.norm(self.first(images))))
        outer = self.norm2(features)
        logits: Tensor = self.head((outer * (outer > 1000)).mean(dim=(2, 3)))
        return logits


def test_what_a_threshold_hides_is_found_in_the_layer_that_reads_it() -> None:
    for name, branch in _INEXACT.items():
        groups = find_drawable_groups(_Hiding(branch), random_images(1))
        assert groups.sizes == {"second": 10}, name
    for name, branch in _EXACT.items():
        groups = find_drawable_groups(_Hiding(branch), random_images(1))
        assert groups.sizes == {"first": 32, "second": 10}, name


class _Switching(nn.Module):
    """While it trains another norm takes the place of one, and an auxiliary head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(9, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.third, self.norm3 = nn.Conv2d(8, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.head, self.auxiliary = nn.Linear(7, 5), nn.Linear(9, 5)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.norm(self.first(images)), images], dim=1)
        features = self.norms[int(self.training)](self.second(both)).relu()
        logits: Tensor = self.head(self.norm3(self.third(features)).relu().mean(dim=(2, 3)))
        return logits + self.auxiliary(both.mean(dim=(2, 3))) if self.training else logits


def test_a_head_of_training_mode_beside_a_norm_of_eval_mode_keeps_its_inputs() -> None:
    """Only eval mode was tried: after a draw the first step of training failed."""
    groups = find_drawable_groups(_Switching(), random_images(2))
    assert groups.sizes == {"third": 7}
    assert groups.dense["norm"].startswith("without some of its channels the network fails")
    assert "norms.1, which the example inputs do not reach" in groups.dense["norms.0"]


class _Many(nn.Module):
    """Blocks of one kind, none of which can be drawn."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Branching(_INEXACT["mean"], 8) for _ in range(num_blocks))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([block(images) for block in self.blocks]).sum(0)


def test_one_kind_is_not_tried_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of many blocks took minutes."""
    passes = 0
    whole = Rehearsal.difference

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal passes
        passes += 1
        return whole(*arguments, **keywords)

    monkeypatch.setattr(Rehearsal, "difference", counted)
    groups = find_drawable_groups(_Many(24), random_images(1))
    assert set(groups.sizes) == {f"blocks.{number}.second" for number in range(24)}
    assert passes < 16


def test_what_is_in_doubt_after_many_trials_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "_MAX_TRIALS", 0)
    network = _Branching(_INEXACT["mean"])
    groups = find_drawable_groups(network, random_images(1), optional=True)
    assert not groups
    assert "still in doubt" in groups.dense["norm"]


def test_a_long_trial_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exactness, "_SECONDS_BEFORE_WARNING", -1.0)
    with caplog.at_level(logging.WARNING):
        find_drawable_groups(Plain(), random_images(1))
    (line,) = caplog.messages
    assert line.startswith("attach: channels are dropped from a copy")


def test_large_images_are_tried_by_a_corner() -> None:
    """And a network that insists on their size by all of them."""
    sizes: list[int] = []

    def seen(x: Tensor) -> Tensor:
        sizes.append(x.shape[-1])
        return x

    network = _Branching(seen)
    assert len(find_drawable_groups(network, random_images(1, side=160))) == 2
    in_each_mode, tried = sizes[:2], sizes[2:]
    assert set(in_each_mode) == {160} and set(tried) == {96}
    fixed = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 40 * 40, 5)
    )
    assert find_drawable_groups(fixed, random_images(1, side=160)).sizes == {"0": 8}
    with pytest.raises(ConfigError, match="does not run on the example inputs"):
        find_drawable_groups(copy.deepcopy(fixed), random_images(1, side=170))


def _on_large_features(network: _Assisted, features: Tensor) -> Tensor:
    if features.shape[-1] < 100:
        raise ValueError("there is nothing left behind the pooling")
    return network.auxiliary(features)


def test_a_corner_that_reaches_less_than_the_whole_image_is_not_enough() -> None:
    """Inception's auxiliary head does not fit on a corner, so what it reads stayed dense."""
    groups = find_drawable_groups(_Assisted(_on_large_features), random_images(1, side=160))
    assert groups.sizes == {"conv1": 8, "conv2": 6, "aux": 4}


def _in_single_precision(network: _Assisted, features: Tensor) -> Tensor:
    return network.auxiliary(features.float())


def test_a_training_mode_that_fails_in_double_precision_is_left_out() -> None:
    groups = find_drawable_groups(_Assisted(_in_single_precision), random_images(2))
    assert groups.sizes == {"conv1": 8, "conv2": 6, "aux": 4}


@pytest.mark.parametrize("build", [Plain, Normless])
def test_a_trial_leaves_the_weights_that_it_shares_alone(build: type[nn.Module]) -> None:
    network = build().eval()
    groups = find_groups(network, random_images(2))
    rehearsal = Rehearsal(network, random_images(2))
    before = copy.deepcopy((network.state_dict(), rehearsal.network.state_dict()))
    mask = Mask({name: torch.arange(size) < 2 for name, size in groups.sizes.items()})
    with torch.no_grad():
        assert rehearsal.difference(groups, mask) is None
    after = (network.state_dict(), rehearsal.network.state_dict())
    for tensors, same in zip(after, before, strict=True):
        assert tensors.keys() == same.keys()
        assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())


@pytest.mark.slow("a network of a hundred layers, ten seconds")
def test_rounding_that_a_deep_network_amplifies_is_no_difference() -> None:
    """With random weights it came to 6e-9 of the outputs, and everything stayed dense."""
    network = models.efficientnet_v2_s(weights=None, num_classes=5)
    assert len(find_drawable_groups(network, random_images(2, side=64))) == 45
