"""Random networks: of blocks one after another, a head, and several ways to put out and to call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ticket.random_blocks import Block, Step
from tests.ticket.random_kinds import KINDS
from tests.ticket.random_looks import LOOKS, SAFE_LOOKS

__all__ = ["RandomNetwork", "Recipe", "look_trained", "recipes"]

_HEADS = ("pooled", "hidden", "flat", "map", "products", "normed")
_OUTPUTS = ("logits", "pair", "dict", "features", "in training")
_LARGEST_SIDE = 8


class Recipe(NamedTuple):
    """What a network is made by.

    Attributes:
        steps: its blocks.
        head: of ``_HEADS``: what makes the logits.
        outputs: of ``_OUTPUTS``: what is put out besides.
        batch, side: of the example inputs.
        with_extra: whether the example has the input that is optional.
        seed: of weights and inputs.
    """

    steps: tuple[Step, ...]
    head: str
    outputs: str
    batch: int
    side: int
    with_extra: bool
    seed: int

    def built(self) -> RandomNetwork:
        torch.manual_seed(self.seed)
        return RandomNetwork(self).double()


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    """Most looks are harmless, or hardly any group would be drawn."""
    kind = draw(st.sampled_from(list(KINDS)))
    looks = [
        draw(st.sampled_from(list(LOOKS if draw(st.integers(0, 5)) == 5 else SAFE_LOOKS)))
        for _ in range(2)
    ]
    return Step(kind, draw(st.sampled_from([4, 6, 8])), *looks)


def recipes() -> st.SearchStrategy[Recipe]:
    return st.builds(
        Recipe,
        st.lists(_steps(), min_size=1, max_size=4).map(tuple),
        st.sampled_from(_HEADS),
        st.sampled_from(_OUTPUTS),
        st.integers(1, 3),
        st.sampled_from([4, 5, 8]),
        st.booleans(),
        st.integers(0, 2**16),
    )


class RandomNetwork(nn.Module):
    """Called with images, and maybe another input and a flag, for the blocks that ask for them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.blocks = nn.ModuleList()
        width = 3
        for step in recipe.steps:
            block = KINDS[step.kind](step, width)
            self.blocks.append(block)
            width = block.width
        self.head = _Head(recipe.head, width)
        if recipe.outputs != "logits":
            first = self.blocks[0]
            assert isinstance(first, Block)
            self.auxiliary = nn.Linear(first.width, 4)

    def forward(self, images: Tensor, extra: Tensor | None = None, flag: bool = False) -> Any:
        given: Mapping[str, Any] = {"extra": extra, "flag": flag, "": None}
        x, all_features = images, []
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block(x, given[block.asks]) if block.asks else block(x)
            if x.shape[-1] > _LARGEST_SIDE:
                x = F.adaptive_avg_pool2d(x, _LARGEST_SIDE)
            all_features.append(x)
        logits: Tensor = self.head(x)
        how = self.recipe.outputs
        if how == "features":
            return logits, [all_features[0]]
        if how == "logits" or (how == "in training" and not self.training):
            return logits
        auxiliary = self.auxiliary(all_features[0].mean((2, 3)))
        return {"out": logits, "aux": auxiliary} if how == "dict" else (logits, auxiliary)

    def inputs(self, batch: int, side: int, seed: int, with_extra: bool) -> dict[str, Any]:
        """Keyword inputs."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)
        extra = torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64)
        return {"images": images, "extra": extra} if with_extra else {"images": images}

    def example(self) -> dict[str, Any]:
        recipe = self.recipe
        return self.inputs(recipe.batch, recipe.side, recipe.seed + 1, recipe.with_extra)

    def calls(self, batch: int, side: int, seed: int) -> list[dict[str, Any]]:
        """Every way in which it can be called, each with inputs of its own."""
        asked = {block.asks for block in self.blocks if isinstance(block, Block)}
        ways = [self.inputs(batch, side, seed, self.recipe.with_extra)]
        if "extra" in asked:
            ways.append(self.inputs(batch, side, seed + 1, not self.recipe.with_extra))
        if "flag" in asked:
            ways.append({**ways[0], "flag": True})
        return ways


class _Head(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        sizes = {"hidden": 6, "flat": 4 * width, "products": width * width}
        if kind == "hidden":
            self.layer: nn.Module = nn.Linear(width, 6)
            self.norm: nn.Module = nn.BatchNorm1d(6)
        elif kind == "normed":
            self.layer, self.norm = nn.Conv2d(width, 6, 1), nn.BatchNorm2d(6)
        self.last: nn.Module = nn.Linear(sizes.get(kind, width), 5)
        if kind == "map":
            self.last = nn.Conv2d(width, 5, 1)
        elif kind == "normed":
            self.last = nn.Flatten(2)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "hidden":
            x = self.norm(self.layer(x.mean((2, 3)))).relu()
        elif self.kind == "normed":
            x = self.norm(self.layer(x))
        elif self.kind == "flat":
            x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        elif self.kind == "products":
            pixels = x.flatten(2)
            x = (pixels @ pixels.transpose(1, 2) / pixels.shape[2]).flatten(1)
        elif self.kind == "pooled":
            x = x.mean((2, 3))
        return self.last(x)


@torch.no_grad()
def look_trained(network: nn.Module, seed: int) -> None:
    """Other weights than at first: scales of both signs, shifts and statistics as they come."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(0.1 * noise)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            if module.affine:
                signs = torch.randint(0, 2, module.weight.shape, generator=generator) * 2 - 1
                module.weight.uniform_(0.2, 2, generator=generator).mul_(signs)
                module.bias.normal_(generator=generator)
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.3, 3, generator=generator)
