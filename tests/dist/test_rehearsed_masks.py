"""The mask that is drawn is tried before anything is cut, on the example and on what the network
has been trained with; where it would change what is computed, everything stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.failing import everything
from tests.nets import random_images
from tests.ranks import NO_GROUP, Ranks
from tests.resuming import differences
from worm_dist import DrawError, Engine, Mask, WormConfig

pytestmark = pytest.mark.slow("rehearses many masks, ten seconds")

_Way = Callable[[Tensor], Tensor]


def _of_width(width: int) -> _Way:
    """Something else at one width alone, which no trial is likely to hit."""
    return lambda x: -x if x.shape[1] == width else x


_WAYS: dict[str, _Way] = {
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(1) * 8,
    "first half": lambda x: torch.cat([x[:, :16], 2 * x[:, 16:]], 1),
    "fixed width": lambda x: x * torch.ones(32)[None, :, None, None],
    "width of 13": _of_width(13),
    "nothing": lambda x: x,
}


class _Routing(nn.Module):
    """Which way the images go is decided when it is called.

    Args:
        way: what is done to features on the other way.
        decides: "argument", "mode", "images" or "switch".
    """

    def __init__(self, way: str, decides: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 5)
        self.way, self.decides, self.switch = way, decides, False

    def forward(self, images: Tensor, other: bool = False) -> Tensor:
        features = self.bn1(self.conv1(images))
        goes = {
            "argument": other,
            "mode": self.training,
            "images": bool(images.mean() > 2),
            "switch": self.switch,
        }[self.decides]
        if goes:
            features = _WAYS[self.way](features)
        logits: Tensor = self.head(self.bn2(self.conv2(features)).relu().mean((2, 3)))
        return logits


def _attached(network: nn.Module, num_calls: int = 8) -> Engine:
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    return worm_dist.attach(
        model,
        SGD(network.parameters(), lr=0.01, momentum=0.9),
        WormConfig(
            truncation={"mode": "off"},
            search={"l1": 0.0},
            ticket={"recalibrate_batches": num_calls},
        ),
        example_inputs=random_images(2),
    )


def _step(engine: Engine, number: int, decides: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    images = random_images(6, seed=2 * number + rank) + 3 * (decides == "images")
    keywords: dict[str, Any] = {"other": True} if decides == "argument" else {}
    engine.optimizer.zero_grad()
    engine.model(images, **keywords).square().mean().backward()
    engine.optimizer.step()


def _mask(engine: Engine, kept: int) -> Mask:
    """Drops channels of the first layer, here and there."""
    keep = {name: torch.ones(size, dtype=torch.bool) for name, size in engine.groups.sizes.items()}
    keep["conv1"] = 5 * torch.arange(32) % 32 < kept
    return Mask(keep)


def _drawn(way: str, decides: str, where: int | None, kept: int) -> tuple[str, list[str], bool]:
    """What a draw says, what it has changed if it failed, and whether the network trains on.

    Args:
        where: the rank that goes the other way; all if None.
    """
    torch.manual_seed(0)
    network = _Routing(way, decides)
    engine = _attached(network)
    assert set(engine.groups.sizes) == {"conv1", "conv2"}
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number in range(3):
        _step(engine, number, decides if where in (None, rank) else "")
    network.switch = True
    before = everything(engine, network, engine.optimizer)
    said = ""
    try:
        engine.draw(_mask(engine, kept))
    except DrawError as error:
        said = str(error)
    after = everything(engine, network, engine.optimizer)
    changed = list(differences(before, after, "after")) if said else []
    weight = network.conv1.weight.detach().clone()
    _step(engine, 4, decides)
    return said, changed, not torch.equal(network.conv1.weight, weight)


_REFUSED = [
    *((way, "argument") for way in ("mean", "softmax", "first half", "fixed width")),
    *((way, "images") for way in ("mean", "fixed width")),
    *((way, "switch") for way in ("mean", "fixed width")),
]


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize(("way", "decides"), _REFUSED)
def test_a_way_that_the_example_does_not_take_is_tried_before_the_cut(
    ranks: Ranks, way: str, decides: str, world: int
) -> None:
    """Drawn by what the example showed, the network raised, or put out something else, on what it
    had been trained with."""
    for said, changed, trains in ranks(world, _drawn, way, decides, None, 13):
        assert "a rehearsal on a copy fails" in said and "conv1" in said
        assert changed == [] and trains


@pytest.mark.parametrize("where", [0, 1])
def test_a_way_that_one_rank_alone_takes_stops_all(ranks: Ranks, where: int) -> None:
    for said, changed, trains in ranks(2, _drawn, "fixed width", "argument", where, 13):
        assert f"rank {where}: a rehearsal on a copy fails" in said
        assert changed == [] and trains


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("kept", [13, 14])
def test_it_is_the_mask_itself_that_is_tried(ranks: Ranks, kept: int, world: int) -> None:
    """Code that looks at the number of channels passes every trial with other numbers."""
    for said, changed, trains in ranks(world, _drawn, "width of 13", "switch", None, kept):
        assert bool(said) == (kept == 13)
        assert changed == [] and trains


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("decides", ["argument", "mode", "images", "switch"])
def test_a_way_on_which_nothing_happens_is_no_obstacle(
    ranks: Ranks, decides: str, world: int
) -> None:
    for said, _, trains in ranks(world, _drawn, "nothing", decides, None, 13):
        assert said == "" and trains


class _Changing(_Routing):
    """Insists on its second argument once it has been told to."""

    def __init__(self) -> None:
        super().__init__("nothing", "switch")

    def forward(self, images: Tensor, other: bool = False) -> Tensor:
        if self.switch and not other:
            raise TypeError("say which way")
        return super().forward(images, other)


def _not_rehearsed() -> tuple[str, list[str]]:
    network = _Changing()
    engine = _attached(network)
    _step(engine, 0, "")
    network.switch = True
    before = everything(engine, network, engine.optimizer)
    try:
        engine.draw(_mask(engine, 13))
    except DrawError as error:
        after = everything(engine, network, engine.optimizer)
        return str(error), list(differences(before, after, "after"))
    return "nothing", []


@pytest.mark.parametrize("world", [NO_GROUP, 2])
def test_what_cannot_be_rehearsed_is_not_drawn(ranks: Ranks, world: int) -> None:
    """It was drawn, and the error came from the inside with the network already cut."""
    for said, changed in ranks(world, _not_rehearsed):
        assert "cannot be rehearsed (TypeError: say which way); attach again" in said
        assert changed == []
