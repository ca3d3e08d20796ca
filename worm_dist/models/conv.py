"""The one convolution of our networks, and how it is initialised.

Kaiming-normal with fan-out keeps the gradients' scale through layers of ReLU.  BatchNorm
(gamma = 1, beta = 0) and linear layers keep torch's own defaults.
"""

from __future__ import annotations

from torch import nn

__all__: list[str] = []


def conv(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A ``size`` x ``size`` convolution that keeps the image's side (over ``stride``).

    It has no bias: the BatchNorm that follows has its own shift.
    """
    layer = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
