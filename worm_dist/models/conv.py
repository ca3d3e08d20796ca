"""The convolution of our networks and its initialisation.

Kaiming-normal with fan-out preserves the scale of gradients through layers with ReLU.  BatchNorm
(gamma = 1, beta = 0) and linear layers keep torch's defaults.
"""

from __future__ import annotations

from torch import nn

__all__: list[str] = []


def conv(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a ``size`` x ``size`` convolution whose output side is the input side / ``stride``.

    It has no bias, since the BatchNorm that follows has a shift.
    """
    layer = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
    initialize(layer)
    return layer


def initialize(layer: nn.Conv2d) -> None:
    """Initialise the weights of a convolution again, for its present shape."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
