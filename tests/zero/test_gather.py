"""The gather of updated weights: one collective for each group of parameters, two where the ranks'
shares are far apart.

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
from worm_dist.comm_hooks import shares

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank")

_GATHERS = {"all_gather_single", "all_gather_into_tensor"}  # the name before torch 2.14


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
    """Three steps with frozen channels: as they are, and without padding."""
    overheard = Overheard()
    found: dict[str, list[_Step]] = {"chosen": [], "in chunks": []}
    for way, steps in found.items():
        if way == "in chunks":
            vars(shares)["_BYTES_OF_A_COLLECTIVE"] = 0
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
    for outcome in ranks.outcomes(3, _steps, stage, 16, 10):
        assert outcome.exitcode == 0, str(outcome)
        for mine, other in zip(*outcome.value.values(), strict=True):
            assert sum(mine.calls.values()) == 2 and mine.calls.keys() <= _GATHERS
            assert other.calls["all_to_all_single"] == 1, "vectors are sent whole, in equal shares"
            assert all(torch.equal(*pair) for pair in zip(mine.weights, other.weights))


@pytest.mark.parametrize(("size", "num_moves", "num_gathers"), [(2, 2, 0), (3, 1, 2)])
def test_ranks_whose_shares_are_far_apart_move_elements(
    ranks: Ranks, size: int, num_moves: int, num_gathers: int
) -> None:
    """A classifier fills the last partition, half of the others is frozen: padded to its share, the
    others would hand over 200 KiB that mean nothing.  Two ranks send each other their shares."""
    found = []
    for outcome in ranks.outcomes(size, _steps, 2, 128, 1200):
        assert outcome.exitcode == 0, str(outcome)
        chosen, in_chunks = outcome.value.values()
        for mine, other in zip(chosen, in_chunks, strict=True):
            assert mine.calls["all_to_all_single"] == num_moves
            assert sum(mine.calls.values()) == num_moves + num_gathers
            assert mine.calls.keys() <= {"all_to_all_single", *_GATHERS}
            assert all(torch.equal(*pair) for pair in zip(mine.weights, other.weights))
        found.append(chosen[-1])
    first, *_, last = found
    assert last.handed_over > first.handed_over
    assert len({step.said for step in found}) == 1
