"""The gather of updated weights: one collective for each group of parameters, or what is cheaper.

Every rank used to broadcast its share: as many collectives as ranks, in every step and group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.zero.building import engine_around, settings_of
from tests.zero.payload import Overheard
from worm_dist import WormConfig
from worm_dist.comm_hooks import deepspeed_allgather
from worm_dist.comm_hooks.deepspeed_allgather import padding_pays

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank")

_KIB = 2**10
_GATHERS = {"all_gather_single", "all_gather_into_tensor"}  # the name before torch 2.14


@pytest.mark.parametrize(
    ("shares", "element_size", "pays"),
    [
        ([100, 100], 4, True),
        ([64 * _KIB, 0], 4, False),  # a single broadcast: nothing is saved
        ([64 * _KIB, 1], 4, True),  # an element less than 256 KiB of padding
        ([64 * _KIB + 2, 1], 4, False),
        ([128 * _KIB + 2, 1], 2, False),
        ([64 * _KIB, 1, 1, 64 * _KIB], 4, True),  # 512 KiB, and three broadcasts fewer
        ([10**9, 10**9 - 1], 4, True),
        ([10**7, 10**7, 10**7, 5 * 10**6], 4, False),
    ],
)
def test_padding_is_weighed_against_the_broadcasts_it_saves(
    shares: list[int], element_size: int, pays: bool
) -> None:
    assert padding_pays(shares, element_size) == pays
    assert padding_pays(shares[::-1], element_size) == pays, "which rank is which does not matter"


class _TopHeavy(Plain):
    """All of the last rank's partition is a classifier without channels to drop."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, width)
        self.head = nn.Linear(width, num_classes)


class _Step(NamedTuple):
    """Of an optimizer step while channels are frozen.

    Attributes:
        calls: number of collectives by name.
        handed_over, said: bytes; ``said`` includes the gradients, which are not in the other.
        weights: all parameters after it.
    """

    calls: Mapping[str, int]
    handed_over: int
    said: int
    weights: list[Tensor]


def _engine(stage: int, width: int, num_classes: int) -> Any:
    torch.manual_seed(0)
    network = _TopHeavy(width, num_classes)
    parameters = list(network.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": 0.02},
    ]
    optimizer = SGD(groups, lr=0.05, momentum=0.9)
    model = engine_around(network, optimizer, settings_of(stage))
    config = WormConfig(truncation={"frozen_weights": "hold"})
    return worm_dist.attach(model, config=config, example_inputs=random_images(1))


def _steps(stage: int, width: int, num_classes: int) -> dict[str, list[_Step]]:
    """Three steps with frozen channels: as they are, and with broadcasts alone."""
    overheard = Overheard()
    found: dict[str, list[_Step]] = {"chosen": [], "broadcast": []}
    for way, steps in found.items():
        if way == "broadcast":
            vars(deepspeed_allgather)["padding_pays"] = lambda *_: False
        engine = _engine(stage, width, num_classes)
        engine.truncate(mask_dropping(engine.groups, *range(width, width + width // 2)))
        for number in range(3):
            model = engine.model
            model.backward(model(random_images(4, seed=number)).square().mean())
            overheard.take()
            before = overheard.calls.copy()
            model.step()
            steps.append(
                _Step(
                    dict(overheard.calls - before),
                    overheard.take(),
                    engine.traffic.sent_bytes,
                    [p.detach().clone() for p in model.module.parameters()],
                )
            )
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_one_collective_for_each_group_of_parameters(ranks: Ranks, stage: int) -> None:
    for outcome in ranks.outcomes(3, _steps, stage, 16, 10, group_timeout=60, wall_limit=60):
        assert outcome.exitcode == 0, str(outcome)
        chosen, broadcast = outcome.value["chosen"], outcome.value["broadcast"]
        for mine, other in zip(chosen, broadcast, strict=True):
            assert sum(mine.calls.values()) == 2 and mine.calls.keys() <= _GATHERS
            assert other.calls == {"broadcast": 6}
            assert all(torch.equal(*pair) for pair in zip(mine.weights, other.weights))


def test_ranks_whose_shares_are_far_apart_broadcast_them(ranks: Ranks) -> None:
    """A classifier fills the one partition, half of the other is frozen: padded to the second's
    share, the first would hand over 290 KiB that mean nothing."""
    found = []
    for outcome in ranks.outcomes(2, _steps, 2, 128, 1200, group_timeout=60, wall_limit=60):
        assert outcome.exitcode == 0, str(outcome)
        chosen, broadcast = outcome.value["chosen"], outcome.value["broadcast"]
        for mine, other in zip(chosen, broadcast, strict=True):
            # Vectors, which are gathered whole, are one collective all the same.
            assert mine.calls.pop("broadcast") == 2
            assert sum(mine.calls.values()) == 1 and mine.calls.keys() <= _GATHERS
            assert all(torch.equal(*pair) for pair in zip(mine.weights, other.weights))
        found.append(chosen[-1])
    first, last = found
    assert last.handed_over - first.handed_over > 256 * _KIB
    assert first.said == last.said
