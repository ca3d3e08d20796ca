"""Networks that other ways to train need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.nets import Plain, Residual

__all__ = ["Detouring", "Shared", "frozen_convolution", "frozen_norm", "frozen_shift"]


class Detouring(Residual):
    """A residual network with one more block that a forward pass may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(8, 5, 1, bias=False)
        self.bn_side = nn.BatchNorm2d(5)
        self.back = nn.Conv2d(5, 8, 1, bias=False)
        self.bn_back = nn.BatchNorm2d(8)

    def forward(self, images: Tensor, detour: bool = True) -> Tensor:
        features = torch.relu(self.bn0(self.stem(images)))
        if detour:
            side = torch.relu(self.bn_side(self.side(features)))
            features = torch.relu(features + self.bn_back(self.back(side)))
        inner = torch.relu(self.bn1(self.conv1(features)))
        outer = torch.relu(features + self.bn2(self.conv2(inner)))
        logits: Tensor = self.head(outer.mean(dim=(2, 3)))
        return logits


class Shared(Plain):
    """Two more convolutions with one weight, whose channels stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.twin1 = nn.Conv2d(8, 8, 1, bias=False)
        self.twin2 = nn.Conv2d(8, 8, 1, bias=False)
        self.twin2.weight = self.twin1.weight
        self.bn3 = nn.BatchNorm2d(8)
        self.conv4 = nn.Conv2d(8, 6, 1)
        self.bn4 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(images)))
        outer = torch.relu(self.bn2(self.conv2(inner)))
        twice = torch.relu(self.bn3(self.twin2(torch.relu(self.twin1(outer)))))
        last = torch.relu(self.bn4(self.conv4(twice)))
        logits: Tensor = self.head(last.mean(dim=(2, 3)))
        return logits


def frozen_norm() -> nn.Module:
    network = Residual()
    network.bn1.requires_grad_(False)
    return network


def frozen_shift() -> nn.Module:
    network = Residual()
    network.bn1.bias.requires_grad_(False)
    return network


def frozen_convolution() -> nn.Module:
    network = Residual()
    network.stem.requires_grad_(False)
    return network
