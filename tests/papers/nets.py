"""Networks of the papers' kinds, small."""

from __future__ import annotations

import torch
from torch import nn

from worm_dist.models.preresnet import PreResNet
from worm_dist.models.resnet import ResNet
from worm_dist.models.vgg import Vgg

__all__ = ["EVEN", "NETS", "build"]

NETS = ("vgg", "resnet", "preresnet")


EVEN = "even"
"""A VGG of 100 scales: distances and means of them may equal a threshold exactly, and in double
precision 0.29 of 100 is 28.999999999999996."""


def build(kind: str, seed: int) -> nn.Module:
    """A network for images ``[batch, 1, 8, 8]`` of ten classes."""
    torch.manual_seed(seed)
    if kind == "vgg":
        return Vgg(10, 1, [12, 16, "M", 24, 30])
    if kind == EVEN:
        return Vgg(10, 1, [20, 20, "M", 30, 30])
    if kind == "preresnet":
        return PreResNet(10, 1, 6, (3, 4), blocks_per_stage=2)
    return ResNet(10, 1, (8, 16, 20), blocks_per_stage=1)
