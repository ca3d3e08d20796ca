from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.nets import Plain, random_images
from tests.search.test_groups_exactness import _Net
from worm_dist.pruning.exactness import find_drawable_groups as find_groups


def _mean_over_channels() -> nn.Module:
    """A mean over fewer channels is another mean, though the dropped ones were zero."""
    return _Net(
        lambda net, x: net.head(_gated(torch.relu(net.bn2(net.conv2(x))))),
        conv2=nn.Conv2d(6, 8, 1),
        bn2=nn.BatchNorm2d(8),
        head=nn.Conv2d(8, 4, 1),
    )


def _gated(features: Tensor) -> Tensor:
    return features * features.mean(dim=1, keepdim=True)


def _softmax_over_channels() -> nn.Module:
    """exp(0) = 1 stands in the denominator; a gate of zero hides it from the consumer."""
    return _Net(
        lambda net, x: net.head(_attended(torch.relu(net.bn2(net.conv2(x))))),
        conv2=nn.Conv2d(6, 8, 1),
        bn2=nn.BatchNorm2d(8),
        head=nn.Conv2d(8, 4, 1),
    )


def _attended(features: Tensor) -> Tensor:
    return features * features.softmax(dim=1)


def _norm_over_channels_without_scale() -> nn.Module:
    return _Net(
        lambda net, x: net.head(net.over(torch.relu(net.bn2(net.conv2(x))))),
        conv2=nn.Conv2d(6, 8, 1),
        bn2=nn.BatchNorm2d(8),
        over=nn.LocalResponseNorm(3),
        head=nn.Conv2d(8, 4, 1),
    )


@pytest.mark.parametrize(
    "build", [_mean_over_channels, _softmax_over_channels, _norm_over_channels_without_scale]
)
def test_what_mixes_channels_without_weights_is_left_dense(build: Callable[[], nn.Module]) -> None:
    """The dropped channels are silent, but the others sound different once they are gone."""
    groups = find_groups(build(), random_images(1))
    assert [group.name for group in groups] == ["conv1"]
    assert groups.dense.keys() == {"bn2"} and groups.dense["bn2"]


class _ByKeyword(Plain):
    def forward(self, images: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(input=images)))
        outer = torch.relu(self.bn2(input=self.conv2(input=inner)))
        logits: Tensor = self.head(input=outer.mean(dim=(2, 3)))
        return logits


def test_layers_may_be_called_by_keyword() -> None:
    groups = find_groups(_ByKeyword(), random_images(1))
    assert [group.name for group in groups] == ["conv1", "conv2"]
