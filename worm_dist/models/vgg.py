"""VGG-like networks (arXiv 1409.1556): a chain of convolutions with BatchNorm and a linear head.

The three large linear layers of the original are replaced by a global average pool and one layer,
as is usual for small images, so images of any size that the pools can halve are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .conv import conv

__all__ = ["Vgg", "vgg11_bn", "vgg_small"]

POOL = "M"

SMALL: tuple[int | str, ...] = (32, 32, POOL, 64, 64, POOL, 128, 128)
VGG11: tuple[int | str, ...] = (
    64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL,
)  # fmt: skip


class Vgg(nn.Module):
    """Blocks of 3x3 convolution, BatchNorm and ReLU, with 2x2 max pools between them.

    Args:
        num_classes: the number of classes.
        in_channels: the number of image channels.
        widths: the number of output channels of every block, in order; ``"M"`` stands for a pool.

    Raises:
        ConfigError: ``widths`` has no width, or an entry that is neither a width nor ``"M"``.
    """

    def __init__(self, num_classes: int, in_channels: int, widths: Sequence[int | str]) -> None:
        super().__init__()
        _check(widths)
        self.features = nn.Sequential(*_layers(in_channels, widths))
        self.head = nn.Linear(_channels(widths)[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, height, width]`` to logits ``[batch, num_classes]``."""
        pooled: Tensor = torch.flatten(
            nn.functional.adaptive_avg_pool2d(self.features(images), 1), 1
        )
        logits: Tensor = self.head(pooled)
        return logits


def vgg_small(num_classes: int, in_channels: int, widths: Sequence[int | str] = SMALL) -> Vgg:
    """Build a VGG of six convolutions for images of at least 8x8 pixels.

    It has 288 170 parameters with one input channel and ten classes.

    Raises:
        ConfigError: ``widths`` is invalid, see :class:`Vgg`.
    """
    return Vgg(num_classes, in_channels, widths)


def vgg11_bn(num_classes: int, in_channels: int) -> Vgg:
    """Build the CIFAR form of VGG-11 with BatchNorm, for 32x32 images: 9.2 million parameters."""
    return Vgg(num_classes, in_channels, VGG11)


def _channels(widths: Sequence[int | str]) -> list[int]:
    return [width for width in widths if isinstance(width, int)]


def _layers(in_channels: int, widths: Sequence[int | str]) -> Iterator[nn.Module]:
    for width in widths:
        if isinstance(width, int):
            yield conv(in_channels, width)
            yield nn.BatchNorm2d(width)
            yield nn.ReLU(inplace=True)
            in_channels = width
        else:
            yield nn.MaxPool2d(2)


def _check(widths: object) -> None:
    entries = list(widths) if isinstance(widths, Sequence) else []
    numbers = [entry for entry in entries if entry != POOL]
    if not numbers or not all(type(number) is int and number > 0 for number in numbers):
        raise ConfigError(
            "model.arguments.widths: must list the channels of each convolution, and "
            f'"{POOL}" for each pool, such as [32, "{POOL}", 64]; got {widths!r}'
        )
