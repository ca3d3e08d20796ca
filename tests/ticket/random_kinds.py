"""Kinds: what the blocks of random networks can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ticket.random_blocks import (
    Block,
    ChannelsLast,
    Either,
    Gate,
    Grouped,
    Layer,
    Residual,
    Scaled,
    Shared,
    Simple,
    Split,
    Stacked,
    Step,
    WithExtra,
)

__all__ = ["KINDS"]


def _gated_half(x: Tensor, inner: nn.Module) -> Tensor:
    one, other = inner(x).chunk(2, dim=1)
    gated: Tensor = one * other.sigmoid()
    return gated


def _shuffled(x: Tensor, inner: nn.Module) -> Tensor:
    x = inner(x)
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def _halves(reduced: Callable[[Tensor], Tensor]) -> Callable[[Tensor, nn.Module], Tensor]:
    def what(x: Tensor, inner: nn.Module) -> Tensor:
        x = inner(x)
        return reduced(x.view(len(x), 2, -1, *x.shape[2:]))

    return what


def _pairs(x: Tensor, inner: nn.Module) -> Tensor:
    x = inner(x)
    return x.view(len(x), -1, 2, *x.shape[2:]).amax(2)


def _simple(
    what: Callable[[Tensor, nn.Module], Tensor], width: Callable[[int, int], int]
) -> Callable[[Step, int], Block]:
    return lambda step, n: Simple(step, n, what, width(n, step.width))


def _layer(layer: Callable[[int], nn.Module]) -> Callable[[Step, int], Block]:
    return lambda step, n: Layer(step, n, layer)


KINDS: Mapping[str, Callable[[Step, int], Block]] = {
    "plain": _simple(lambda x, inner: inner(x), lambda n, w: w),
    "residual": lambda step, n: Residual(step, n, "identity"),
    "residual through a norm": lambda step, n: Residual(step, n, "norm"),
    "residual through a layer": lambda step, n: Residual(step, n, "layer"),
    "concatenated": _simple(lambda x, inner: torch.cat([x, inner(x)], 1), lambda n, w: n + w),
    "concatenated first": _simple(
        lambda x, inner: torch.cat([inner(x), x.relu()], 1), lambda n, w: n + w
    ),
    "doubled": _simple(lambda x, inner: inner(x).repeat(1, 2, 1, 1), lambda n, w: 2 * w),
    "each doubled": _simple(lambda x, inner: inner(x).repeat_interleave(2, 1), lambda n, w: 2 * w),
    "padded": _simple(lambda x, inner: F.pad(inner(x), (0, 0, 0, 0, 1, 1)), lambda n, w: w + 2),
    "stacked": Stacked,
    "gated half": _simple(_gated_half, lambda n, w: w // 2),
    "split": Split,
    "grouped": lambda step, n: Grouped(step, n, depthwise=False),
    "depthwise": lambda step, n: Grouped(step, n, depthwise=True),
    "gate": Gate,
    "shared": Shared,
    "norm for training": lambda step, n: Either(step, n, "training"),
    "norm on request": lambda step, n: Either(step, n, "flag"),
    "norm by value": lambda step, n: Either(step, n, "value"),
    "extra input": WithExtra,
    "channels last": ChannelsLast,
    "shuffled": _simple(_shuffled, lambda n, w: w),
    "sum of halves": _simple(_halves(lambda x: x.sum(1)), lambda n, w: w // 2),
    "mean of halves": _simple(_halves(lambda x: x.mean(1)), lambda n, w: w // 2),
    "maximum of halves": _simple(_halves(lambda x: x.amax(1)), lambda n, w: w // 2),
    "maximum of pairs": _simple(_pairs, lambda n, w: w // 2),
    "pixels from channels": _simple(
        lambda x, inner: F.pixel_shuffle(inner(x).repeat_interleave(2, 1), 2), lambda n, w: w // 2
    ),
    "scaled by a parameter": lambda step, n: Scaled(step, n, trains=True),
    "scaled by a buffer": lambda step, n: Scaled(step, n, trains=False),
    "group norm": _layer(lambda width: nn.GroupNorm(2, width)),
    "instance norm": _layer(lambda width: nn.InstanceNorm2d(width, affine=True)),
    "batch norm": _layer(nn.BatchNorm2d),
    "norm without scale": _layer(lambda width: nn.BatchNorm2d(width, affine=False)),
    "dropout": _layer(lambda width: nn.Dropout2d(0.5)),
    "slope": _layer(lambda width: nn.PReLU()),
    "slopes": _layer(lambda width: nn.PReLU(width)),
    "transposed": _layer(lambda width: nn.ConvTranspose2d(width, width, 2, 2)),
    "largest": _layer(lambda width: nn.AdaptiveMaxPool2d(3)),
    "averaged": _layer(lambda width: nn.AvgPool2d(2, ceil_mode=True)),
    "upsampled": _layer(lambda width: nn.Upsample(scale_factor=2)),
}
