"""Blocks: parts of random networks, each with layers and norms of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.ticket.random_looks import LOOKS

__all__ = [
    "Block",
    "ChannelsLast",
    "Either",
    "Gate",
    "Grouped",
    "Layer",
    "Residual",
    "Scaled",
    "Shared",
    "Simple",
    "Split",
    "Stacked",
    "Step",
    "WithExtra",
]


class Step(NamedTuple):
    """What a block is made by.

    Attributes:
        kind: of ``random_kinds.KINDS``.
        width: how many channels it makes, even; some kinds keep the width that there is.
        before: of ``LOOKS``: what is done between the norm and the activation.
        after: of ``LOOKS``: the activation.
    """

    kind: str
    width: int
    before: str = "nothing"
    after: str = "relu"


class Block(nn.Module):
    """Called with features and what the network's caller may have given besides.

    Attributes:
        width: channels that it puts out.
        asks: what of the caller's it looks at: ``flag``, ``extra`` or nothing.
    """

    asks = ""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.step = step
        self.width = width

    def unit(self, num_inputs: int, width: int, groups: int = 1) -> nn.Module:
        return _Unit(self.step, num_inputs, width, groups)

    def act(self, x: Tensor) -> Tensor:
        return LOOKS[self.step.after](LOOKS[self.step.before](x))


class _Unit(nn.Module):
    """Convolution, norm, look, activation."""

    def __init__(self, step: Step, num_inputs: int, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_inputs, width, 3, padding=1, groups=groups, bias=width % 4 == 0)
        self.norm = nn.BatchNorm2d(width)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return LOOKS[self.step.after](LOOKS[self.step.before](self.norm(self.conv(x))))


class Simple(Block):
    """One unit, around which a function is."""

    def __init__(
        self, step: Step, num_inputs: int, what: Callable[[Tensor, nn.Module], Tensor], width: int
    ) -> None:
        super().__init__(step, width)
        self.inner = self.unit(num_inputs, step.width)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x, self.inner)


class Residual(Block):
    def __init__(self, step: Step, num_inputs: int, shortcut: str) -> None:
        super().__init__(step, num_inputs if shortcut == "identity" else step.width)
        self.inner = self.unit(num_inputs, step.width)
        self.conv = nn.Conv2d(step.width, self.width, 1)
        self.norm = nn.BatchNorm2d(self.width)
        self.shortcut: nn.Module = nn.Identity()
        if shortcut != "identity":
            self.shortcut = nn.Conv2d(num_inputs, self.width, 1)
        if shortcut == "norm":
            self.shortcut = nn.Sequential(self.shortcut, nn.BatchNorm2d(self.width))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.shortcut(x) + self.norm(self.conv(self.inner(x)))
        return total.relu()


class Stacked(Block):
    """Norms come first, behind concatenations."""

    def __init__(self, step: Step, num_inputs: int) -> None:
        super().__init__(step, num_inputs + step.width)
        self.norm = nn.BatchNorm2d(num_inputs)
        self.conv = nn.Conv2d(num_inputs, step.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.act(self.norm(x)))], dim=1)


class Split(Block):
    def __init__(self, step: Step, num_inputs: int) -> None:
        super().__init__(step, step.width)
        self.whole = self.unit(num_inputs, step.width)
        self.part = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.whole(x).split([1, self.width - 1], dim=1)
        return torch.cat([rest, self.part(first)], dim=1)


class Grouped(Block):
    def __init__(self, step: Step, num_inputs: int, depthwise: bool) -> None:
        super().__init__(step, step.width)
        self.one = self.unit(num_inputs, step.width)
        self.other = self.unit(step.width, step.width, step.width if depthwise else 2)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.other(self.one(x))
        return features


class Gate(Block):
    """Squeeze and excitation."""

    def __init__(self, step: Step, num_inputs: int) -> None:
        super().__init__(step, step.width)
        self.inner = self.unit(num_inputs, step.width)
        self.squeeze = nn.Linear(step.width, 2)
        self.excite = nn.Linear(2, step.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        factors = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        gated: Tensor = x * factors[:, :, None, None]
        return gated


class Shared(Block):
    """A unit that is called twice."""

    def __init__(self, step: Step, num_inputs: int) -> None:
        super().__init__(step, step.width)
        self.first = self.unit(num_inputs, step.width)
        self.twice = self.unit(step.width, step.width)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.twice(self.twice(self.first(x)))
        return features


class Either(Block):
    """Of two norms or units one runs: that for training, that asked for, or that for the values."""

    def __init__(self, step: Step, num_inputs: int, by: str) -> None:
        super().__init__(step, step.width)
        self.asks = "flag" if by == "flag" else ""
        self.by = by
        self.conv = nn.Conv2d(num_inputs, step.width, 1)
        self.one, self.other = nn.BatchNorm2d(step.width), nn.BatchNorm2d(step.width)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        x = self.conv(x)
        by_value = self.by == "value" and bool(x.mean() > 0)
        takes_other = flag or by_value or (self.by == "training" and self.training)
        return self.act(self.other(x) if takes_other else self.one(x))


class WithExtra(Block):
    """Another input of the network may be added, through a layer and a norm or only a layer."""

    asks = "extra"

    def __init__(self, step: Step, num_inputs: int) -> None:
        super().__init__(step, step.width)
        self.inner = self.unit(num_inputs, step.width)
        self.conv, self.norm = nn.Conv2d(3, step.width, 1), nn.BatchNorm2d(step.width)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = self.inner(x)
        return x if extra is None else x + self.norm(self.conv(extra)).mean((2, 3), keepdim=True)


class ChannelsLast(Block):
    """A residual of linear layers over permuted features, with a norm over the transposed ones."""

    def __init__(self, step: Step, num_inputs: int) -> None:
        super().__init__(step, num_inputs)
        self.up, self.norm = nn.Linear(num_inputs, step.width), nn.BatchNorm1d(step.width)
        self.down = nn.Linear(step.width, num_inputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x.permute(0, 2, 3, 1)).flatten(1, 2).transpose(1, 2))
        tokens = self.act(hidden[..., None]).squeeze(-1).transpose(1, 2)
        total: Tensor = x + self.down(tokens).transpose(1, 2).reshape(x.shape)
        return total


class Scaled(Block):
    """A factor for each channel that is a parameter or a buffer of the block itself."""

    def __init__(self, step: Step, num_inputs: int, trains: bool) -> None:
        super().__init__(step, step.width)
        self.inner = self.unit(num_inputs, step.width)
        factors = torch.linspace(0.5, 1.5, step.width).view(1, -1, 1, 1)
        self.factors: Tensor
        if trains:
            self.factors = nn.Parameter(factors)
        else:
            self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.inner(x) * self.factors
        return features


class Layer(Block):
    """A unit with another layer behind it: a norm of another kind, a dropout, PReLU, a pool."""

    def __init__(self, step: Step, num_inputs: int, layer: Callable[[int], nn.Module]) -> None:
        super().__init__(step, step.width)
        self.inner = self.unit(num_inputs, step.width)
        self.layer = layer(step.width)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layer(self.inner(x))
        return features
