"""With truncation off DeepSpeed is left alone, and what it sends is still known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images
from tests.ranks import Ranks
from tests.zero.building import engine_around, settings_of, whole
from tests.zero.payload import Overheard
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank")

_WAYS = ((0, 2), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2))
"""Stage, and passes a step."""


def _around(stage: int, passes: int) -> Any:
    torch.manual_seed(0)
    network = Residual()
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
    settings = settings_of(stage, gradient_accumulation_steps=passes)
    return engine_around(network, optimizer, settings)


def _step(model: Any, passes: int) -> list[Tensor]:
    for number in range(passes):
        model.backward(model(random_images(4, seed=number)).square().mean())
        model.step()
    with whole(model, model.module):
        return [p.detach().clone() for p in model.module.parameters()]


def _two_steps(overheard: Overheard, stage: int, passes: int) -> list[tuple[bool, int, int, int]]:
    """After each step: whether weights are those of an engine that nothing is attached to; bytes
    handed over, said to be sent, said to be dense."""
    plain, model = _around(stage, passes), _around(stage, passes)
    engine = worm_dist.attach(
        model,
        config=WormConfig.preset("early-bird"),
        example_inputs=random_images(1),
        steps_per_epoch=4,
    )
    assert (
        not {"average_tensor", "allreduce_and_copy"} & (vars(model) | vars(model.optimizer)).keys()
    )
    seen = []
    for _ in range(2):
        expected = _step(plain, passes)
        overheard.take()
        weights = _step(model, passes)
        handed_over = overheard.take()
        equal = all(torch.equal(*pair) for pair in zip(weights, expected, strict=True))
        traffic = engine.traffic
        seen.append((equal, handed_over, traffic.sent_bytes, traffic.dense_bytes))
        engine.check()
    return seen


def _all_ways() -> dict[tuple[int, int], list[tuple[bool, int, int, int]]]:
    overheard = Overheard()
    return {way: _two_steps(overheard, *way) for way in _WAYS}


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    outcomes = Ranks(tmp_path_factory.mktemp("off")).outcomes(2, _all_ways)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize("way", _WAYS, ids=str)
def test_nothing_is_changed_and_everything_counted(
    everyone: list[Any], way: tuple[int, int]
) -> None:
    for seen in everyone:
        for equal, handed_over, sent, dense in seen[way]:
            assert equal
            assert sent == dense
            # In stage 3 the first steps compare the order of the layers, too.
            assert handed_over == sent or way[0] == 3
