"""Whatever a network is like, tracing comes to an end, and says what it has not understood."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, resnet50
from torchvision.models.swin_transformer import ShiftedWindowAttention

from tests.nets import Plain, random_images
from worm_dist.config import SearchConfig
from worm_dist.groups import dependency
from worm_dist.groups.tracing import find_groups
from worm_dist.pruning.exactness import find_drawable_groups


def test_resnet50_is_traced_in_a_second_or_two() -> None:
    network = resnet50()
    start = time.process_time()
    groups = find_groups(network, random_images(1, side=32))
    assert time.process_time() - start < 10
    assert len(groups) == 37


class _WindowMixer(ShiftedWindowAttention):  # type: ignore[misc]  # torchvision has no types
    """Swin's attention, by a name that nobody knows; it calls none of its layers."""


class _ShiftAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """By a name that sounds like an attention; how it wants to be cut is not known."""


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (_WindowMixer, {"qkv": "it is never called", "proj": "it is never called"}),
        (_ShiftAttention, {"": "without some of its channels the network fails"}),
    ],
)
def test_an_unknown_attention_ends_with_a_reason(
    kind: type[ShiftedWindowAttention], left: dict[str, str]
) -> None:
    """Rolled windows sent every channel to places that do not exist, and from there on and on:
    after two hundred million calls, ten times over, it was given up."""
    network = SwinTransformer([2, 2], 12, [2, 2], [3, 6], [3, 2], num_classes=5)
    attentions = []
    for name, module in network.named_modules():
        if type(module) is ShiftedWindowAttention:
            module.__class__ = kind
            attentions.append(name)
    start = time.process_time()
    groups = find_drawable_groups(
        network, torch.randn(2, 3, 14, 10), SearchConfig(importance="weight_norm")
    )
    assert time.process_time() - start < 10
    assert [group.name.rpartition(".")[0] for group in groups] == [
        name.replace("attn", "mlp") for name in attentions
    ]
    for attention in attentions:
        for layer, reason in left.items():
            assert groups.dense[f"{attention}.{layer}".rstrip(".")].startswith(reason)


class _Rolled(nn.Module):
    """Channels that wander: torch-pruning takes a roll for an operation on each alone."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()
        self.conv = nn.Conv2d(3, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.bn(self.conv(images)))
        for _ in range(12):
            features = features + features.roll(1, dims=1)
        return self.plain(images), self.head(features)


def test_channels_that_wander_stay_dense() -> None:
    groups = find_drawable_groups(_Rolled(), random_images(2))
    assert groups.sizes == {"plain.conv1": 6, "plain.conv2": 8}
    assert groups.dense == {"bn": "without some of its channels the network computes other values"}


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed, so that all ranks give up at the same place."""
    monkeypatch.setattr(dependency, "_MAX_WIDTH_QUERIES", 5)
    groups = find_groups(Plain(), random_images(1))
    assert len(groups) == 0
    gave_up = "not traced: TimeoutError: too many paths lead through it"
    assert groups.dense[""] == groups.dense["conv1"] == gave_up
