"""Looks at channels: what random networks do between their layers, from activations to code that
depends on how many channels there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOOKS", "SAFE_LOOKS", "Look"]

Look = Callable[[Tensor], Tensor]
"""Of a tensor ``[batch, channels, height, width]``, which keeps its shape."""


def _largest_two(x: Tensor) -> Tensor:
    return x * x.topk(2, dim=1).values.sum(dim=1, keepdim=True).tanh()


def _folded(x: Tensor) -> Tensor:
    """The first half of the channels is added to the second."""
    first, second = x.chunk(2, dim=1)
    return (
        torch.cat([second, first], dim=1)
        if first.shape != second.shape
        else x + first.repeat(1, 2, 1, 1)
    )


def _negated_on_average(x: Tensor) -> Tensor:
    return -x if bool(x.mean() > 0) else x


SAFE_LOOKS: Mapping[str, Look] = {
    "nothing": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "squared": lambda x: x * x.tanh(),
    "any": lambda x: x * (x < 0).any(1, keepdim=True),
    "sum": lambda x: x * x.sum(1, keepdim=True).sigmoid(),
    "norm": lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
    "normalised": lambda x: F.normalize(x, dim=1),
    "largest pixel": lambda x: x * x.amax((2, 3), keepdim=True).tanh(),
    "spatial softmax": lambda x: x * x.flatten(2).softmax(2).view(x.shape),
    "maximum of relu": lambda x: x.relu() * x.relu().amax(1, keepdim=True).sigmoid(),
    "maximum above 1": lambda x: x * (x.amax(1, keepdim=True) > 1),
    "sign of the mean": _negated_on_average,
    "double": lambda x: 2 * x if x.shape[1] > 2 else x + x,
}
"""Zeros among the channels change nothing here."""

LOOKS: Mapping[str, Look] = {
    **SAFE_LOOKS,
    "maximum": lambda x: x * x.amax(1, keepdim=True).sigmoid(),
    "minimum": lambda x: x * x.amin(1, keepdim=True).sigmoid(),
    "minimum of relu": lambda x: x + x.relu().amin(1, keepdim=True),
    "which is largest": lambda x: x * (1 + x.argmax(1, keepdim=True)),
    "maximum above 3": lambda x: x * (x.amax(1, keepdim=True) > 3),
    "maximum above -1": lambda x: x * (x.amax(1, keepdim=True) > -1),
    "minimum below 2": lambda x: x * (x.amin(1, keepdim=True) < 2),
    "any maximum": lambda x: x if bool(x.amax() > 3) else x.relu(),
    "all": lambda x: x * (x > 0).all(1, keepdim=True),
    "largest two": _largest_two,
    "median": lambda x: x * x.median(1, keepdim=True).values.tanh(),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "deviation": lambda x: x / (1 + x.var(1, keepdim=True, correction=0)),
    "norm by width": lambda x: x / (1 + x.norm(dim=1, keepdim=True) / x.shape[1]),
    "softmax": lambda x: x.softmax(1),
    "weighted by softmax": lambda x: x * x.softmax(1),
    "sorted": lambda x: x.sort(1).values,
    "wider than 1": lambda x: x if x.shape[1] > 1 else 2 * x,
    "wider than 3": lambda x: x if x.shape[1] > 3 else 2 * x,
    "width odd": lambda x: x if x.shape[1] % 2 else -x,
    "width a multiple of 3": lambda x: x if x.shape[1] % 3 else -x,
    "first": lambda x: x * x[:, :1].sigmoid(),
    "last": lambda x: x + x[:, -1:].relu(),
    "second": lambda x: x + x[:, [min(1, x.shape[1] - 1)]],
    "every other": lambda x: x + x[:, ::2].sum(1, keepdim=True),
    "without the first": lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=1),
    "folded": _folded,
    "rolled": lambda x: x + x.roll(1, 1).relu(),
    "flipped": lambda x: x + x.flip(1),
    "flipped only": lambda x: x.flip(1),
    "cumulated": lambda x: x.cumsum(1),
    "cumulated weights": lambda x: x * x.cumsum(1).tanh(),
    "cosine": lambda x: x + x.cos(),
    "sigmoid": torch.sigmoid,
    "exponential": lambda x: x.tanh().exp(),
    "softplus": F.softplus,
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "group norm": lambda x: F.group_norm(x, 1),
    "instance norm": lambda x: F.instance_norm(x),
    "response norm": lambda x: F.local_response_norm(x, 3),
    "centred": lambda x: x - x.mean((2, 3), keepdim=True),
    "sum over a batch": lambda x: x + x.mean(0, keepdim=True),
    "plus its place": lambda x: x + torch.arange(x.shape[1]).view(1, -1, 1, 1),
    "times its place": lambda x: x * torch.arange(x.shape[1]).view(1, -1, 1, 1),
    "plus one": lambda x: x + 1,
}
