"""Residual networks with pre-activation (arXiv 1603.05027) of bottleneck blocks, for 32x32 images.

Norm and ReLU stand before each convolution, so the residual stream passes no norm.  The norms that
read the stream are selective: each drops channels for the convolution behind it alone, and the
stream keeps all of its channels.  These are the networks of Early-Bird tickets (arXiv 1909.11957).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..groups.selective_norm import SelectiveBatchNorm2d
from .conv import conv

__all__ = ["Bottleneck", "PreResNet", "preresnet20", "preresnet101"]

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each behind norm and ReLU, with a residual shortcut.

    Where a block changes the shape, its shortcut is a 1x1 convolution without a norm.

    Args:
        in_channels: the number of input channels.
        width: the number of channels inside; there are four times as many at the output.
        stride: the factor by which the image's side shrinks.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * width
        self.bn1 = SelectiveBatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, width, size=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, stride=stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_channels, size=1)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, size=1, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[batch, in, height, width]`` to ``[batch, out, height/stride, width/stride]``."""
        inner = self.conv1(self.relu(self.bn1(images)))
        inner = self.conv2(self.relu(self.bn2(inner)))
        inner = self.conv3(self.relu(self.bn3(inner)))
        outer: Tensor = inner + self.shortcut(images)
        return outer


class PreResNet(nn.Module):
    """A stem, one stage of bottleneck blocks for each width, a norm, and a linear head.

    Every stage but the first halves the image's side.

    Args:
        num_classes: the number of classes.
        in_channels: the number of image channels.
        stem: the number of channels of the first convolution.
        widths: the number of channels inside the blocks of each stage.
        blocks_per_stage: the number of blocks in each stage.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stem: int,
        widths: Sequence[int],
        blocks_per_stage: int,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, stem)
        stages = []
        channels = stem
        for number, width in enumerate(widths):
            stages.append(_stage(channels, width, blocks_per_stage, stride=1 if number == 0 else 2))
            channels = _EXPANSION * width
        self.stages = nn.Sequential(*stages)
        self.bn = SelectiveBatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, height, width]`` to logits ``[batch, num_classes]``."""
        features = self.relu(self.bn(self.stages(self.conv1(images))))
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1)
        logits: Tensor = self.head(pooled)
        return logits


def preresnet20(num_classes: int, in_channels: int) -> PreResNet:
    """Build a network of 20 layers, to try things out: 0.22 million parameters."""
    return PreResNet(num_classes, in_channels, 16, (16, 32, 64), blocks_per_stage=2)


def preresnet101(num_classes: int, in_channels: int) -> PreResNet:
    """Build the network of 101 layers of the Early-Bird paper: 1.0 million parameters."""
    return PreResNet(num_classes, in_channels, 16, (16, 32, 64), blocks_per_stage=11)


def _stage(in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, width, stride)
    rest = (Bottleneck(_EXPANSION * width, width, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)
