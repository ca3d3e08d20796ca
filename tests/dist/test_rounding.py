"""Rounding in a whole run: masks in force and drawn widths are blocks of channels from the first
check on, near to the share that was asked for; masks from elsewhere are taken as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import WormConfig


class Wide(nn.Module):
    """A residual stream, a layer within, convolutions in two groups, a layer too small to round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(48)
        self.inner = nn.Conv2d(48, 44, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(44)
        self.outer = nn.Conv2d(44, 48, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(48)
        self.spread = nn.Conv2d(48, 72, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(72)
        self.grouped = nn.Conv2d(72, 40, 1, groups=2, bias=False)
        self.bn4 = nn.BatchNorm2d(40)
        self.small = nn.Conv2d(40, 20, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu(self.bn0(self.stem(images)))
        inner = torch.relu(self.bn1(self.inner(stream)))
        stream = torch.relu(stream + self.bn2(self.outer(inner)))
        spread = torch.relu(self.bn3(self.spread(stream)))
        grouped = torch.relu(self.bn4(self.grouped(spread)))
        small = torch.relu(self.bn5(self.small(grouped)))
        logits: Tensor = self.head(small.mean(dim=(2, 3)))
        return logits


_WHOLE = {"stem": 48, "inner": 44, "spread": 72, "grouped": 40, "small": 20}
"""Channels of the network in each group."""
_TOGETHER = {"spread": 2, "grouped": 2}
"""How many of them go together; one by one where nothing is said."""
_BLOCK = 8


class Check(NamedTuple):
    """Attributes:
    phase: after it.
    exact: the mask by which the search is judged; on rank zero only.
    mask: in force.
    """

    phase: str
    exact: dict[str, Tensor]
    mask: dict[str, Tensor]


class Seen(NamedTuple):
    """A run.

    Attributes:
        checks: until the ticket was found.
        drawn: outputs of every layer in the drawn network.
        digest: of the mask that was drawn.
    """

    checks: list[Check]
    drawn: dict[str, int]
    digest: str


def _run(preset: str, changes: Mapping[str, Any]) -> Seen:
    """Two steps, then a check, until the ticket is drawn."""
    torch.manual_seed(0)
    network = Wide()
    randomise(network, seed=4)
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    search = {"prune_ratio": 0.37, "window": 4, "settled": 0.2, "l1": 0.01, "every": "2ba"}
    config = WormConfig.preset(
        preset,
        search=search | changes.get("search", {}),
        truncation=changes.get("truncation", {}),
    )
    engine = worm_dist.attach(
        DistributedDataParallel(network),
        optimizer,
        config,
        example_inputs=random_images(1, side=4),
        steps_per_epoch=2,
    )
    assert engine.groups.widths == {name: _TOGETHER.get(name, 1) for name in _WHOLE}
    checks: list[Check] = []
    for number in range(30):
        images = random_images(10, side=4, seed=10 * number + dist.get_rank())
        loss = nn.functional.cross_entropy(engine.model(images), torch.arange(10))
        optimizer.zero_grad()
        (loss + engine.penalty()).backward()
        optimizer.step()
        if engine.phase != "ticket" and number % 2:
            verdict = engine.check()
            assert engine.mask is not None
            exact = dict(engine.history[-1].mask.items()) if engine.history else {}
            checks.append(Check(engine.phase.value, exact, dict(engine.mask.items())))
            if verdict.stage or verdict.ticket:
                engine.draw()
    assert engine.mask is not None
    drawn = {name: network.get_parameter(f"{name}.weight").shape[0] for name in _WHOLE}
    return Seen(checks, drawn, engine.mask.digest)


_SLOWLY: Mapping[str, Any] = {
    "truncation": {"removal": {"duration": "6ba", "fade_steps": 1, "stage": 0.5}}
}
_RUNS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "removed": ("worm", _SLOWLY),
    "removed, by weights": ("worm", {**_SLOWLY, "search": {"importance": "weight_norm"}}),
    "removed, each layer": ("worm", {**_SLOWLY, "search": {"threshold": "layer"}}),
    "hold": ("worm", {"truncation": {"frozen_weights": "hold"}}),
    "nothing truncated": ("worm", {"truncation": {"mode": "off"}}),
}


def _all_runs() -> dict[str, Seen]:
    return {name: _run(*arguments) for name, arguments in _RUNS.items()}


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    outcomes = Ranks(tmp_path_factory.mktemp("rounding")).outcomes(2, _all_runs)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return [outcome.value for outcome in outcomes]


def _kept(mask: Mapping[str, Tensor]) -> dict[str, int]:
    """Channels of the network that a mask keeps in each group."""
    return {name: int(kept.sum()) * _TOGETHER.get(name, 1) for name, kept in mask.items()}


def _is_rounded(name: str, count: int) -> bool:
    large = _WHOLE[name] > 4 * _BLOCK
    return not large or count % _BLOCK == 0 or count == _WHOLE[name]


@pytest.mark.slow("a whole search, four seconds")
@pytest.mark.parametrize("name", _RUNS)
def test_every_mask_in_force_is_of_blocks(everyone: list[dict[str, Seen]], name: str) -> None:
    first, second = (seen[name] for seen in everyone)
    assert first.digest == second.digest
    num_rounded = 0
    for check in first.checks:
        for group, count in _kept(check.mask).items():
            assert _is_rounded(group, count), (group, count)
            num_rounded += count != _kept(check.exact)[group]
    assert num_rounded, "the exact masks were of blocks already"


@pytest.mark.parametrize("name", _RUNS)
def test_the_total_is_the_exact_one_up_to_half_a_block(
    everyone: list[dict[str, Seen]], name: str
) -> None:
    for check in everyone[0][name].checks:
        exact, mask = _kept(check.exact), _kept(check.mask)
        assert abs(sum(mask.values()) - sum(exact.values())) <= _BLOCK // 2, (exact, mask)


@pytest.mark.parametrize("name", _RUNS)
def test_the_network_is_drawn_in_blocks(everyone: list[dict[str, Seen]], name: str) -> None:
    for ranks_own in everyone:
        seen = ranks_own[name]
        assert len(seen.checks) < 15, "no ticket was found"
        assert seen.drawn == _kept(seen.checks[-1].mask)
        assert 48 + 44 + 72 + 40 + 20 - sum(seen.drawn.values()) >= 0.3 * 224


@pytest.mark.parametrize(("make", "given"), [(Wide, (0, 1, 2, 60, 95, 150)), (Residual, (0, 9))])
def test_a_mask_from_elsewhere_is_drawn_to_the_channel(
    make: type[nn.Module], given: tuple[int, ...]
) -> None:
    """Once the search went on beside it, and the ticket had the share of the settings."""
    torch.manual_seed(0)
    network = make()
    optimizer = SGD(network.parameters(), lr=0.1)
    config = WormConfig(search={"prune_ratio": 0.4, "window": 2}, truncation=at_once(1))
    images = random_images(4)
    engine = worm_dist.attach(network, optimizer, config, example_inputs=images, steps_per_epoch=1)
    mask = mask_dropping(engine.groups, *given)
    engine.truncate(mask)
    for _ in range(10):
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if engine.check().ticket:
            break
    engine.draw()
    assert engine.phase == "ticket"
    assert engine.mask == mask
