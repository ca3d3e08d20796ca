"""Networks of the papers' kinds, small."""

from __future__ import annotations

import torch
from torch import nn

from worm_dist.models.resnet import ResNet
from worm_dist.models.vgg import Vgg

__all__ = ["NETS", "build"]

NETS = ("vgg", "resnet")


def build(kind: str, seed: int) -> nn.Module:
    """A network for images ``[batch, 1, 8, 8]`` of ten classes."""
    torch.manual_seed(seed)
    if kind == "vgg":
        return Vgg(10, 1, [12, 16, "M", 24, 30])
    return ResNet(10, 1, (8, 16, 20), blocks_per_stage=1)
