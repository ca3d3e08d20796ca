"""Residual networks (arXiv 1512.03385) of basic blocks for 32x32 images.

The stem is one 3x3 convolution of stride 1 without a pool.  Where a block changes the shape, its
shortcut is a 1x1 convolution with BatchNorm (option B of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conv import conv

__all__ = ["BasicBlock", "ResNet", "resnet18", "resnet20", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual shortcut.

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels.
        stride: the factor by which the image's side shrinks.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                conv(in_channels, out_channels, size=1, stride=stride),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[batch, in, height, width]`` to ``[batch, out, height/stride, width/stride]``."""
        inner = self.relu(self.bn1(self.conv1(images)))
        outer: Tensor = self.relu(self.bn2(self.conv2(inner)) + self.shortcut(images))
        return outer


class ResNet(nn.Module):
    """A stem, one stage of basic blocks for each width, and a linear head.

    Every stage but the first halves the image's side.

    Args:
        num_classes: the number of classes.
        in_channels: the number of image channels.
        widths: the number of channels of each stage.
        blocks_per_stage: the number of basic blocks in each stage.
    """

    def __init__(
        self, num_classes: int, in_channels: int, widths: Sequence[int], blocks_per_stage: int
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        stages = []
        channels = widths[0]
        for number, width in enumerate(widths):
            stages.append(_stage(channels, width, blocks_per_stage, stride=1 if number == 0 else 2))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, height, width]`` to logits ``[batch, num_classes]``."""
        features = self.stages(self.relu(self.bn1(self.conv1(images))))
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1)
        logits: Tensor = self.head(pooled)
        return logits


def resnet18(num_classes: int, in_channels: int) -> ResNet:
    """Build ResNet-18 with four stages of 64 to 512 channels: 11.17 million parameters."""
    return ResNet(num_classes, in_channels, (64, 128, 256, 512), blocks_per_stage=2)


def resnet20(num_classes: int, in_channels: int) -> ResNet:
    """Build the paper's CIFAR network (section 4.2) of 20 layers: 0.27 million parameters."""
    return ResNet(num_classes, in_channels, (16, 32, 64), blocks_per_stage=3)


def resnet56(num_classes: int, in_channels: int) -> ResNet:
    """Build the paper's CIFAR network (section 4.2) of 56 layers: 0.86 million parameters."""
    return ResNet(num_classes, in_channels, (16, 32, 64), blocks_per_stage=9)


def _stage(in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(num_blocks - 1)))
