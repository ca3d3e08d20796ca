"""Truncation starts after a share of the training at the latest, and removal takes its share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images, randomise
from tests.ranks import NO_GROUP, Ranks
from worm_dist import ConfigError, Engine, WormConfig
from worm_dist.config import RemovalConfig
from worm_dist.distributed.collectives import SingleProcessComm
from worm_dist.engine.check_schedule import CheckSchedule
from worm_dist.interval import Interval
from worm_dist.truncation.loss_guard import LossGuard
from worm_dist.truncation.removal import Removal

_NEVER = {"margin": 0.0, "min_masks": 1000}
"""No rule fires."""


def _attached(
    search: dict[str, Any],
    truncation: dict[str, Any],
    total_steps: int | None,
    steps_per_epoch: int | None = None,
) -> Engine:
    torch.manual_seed(0)
    network: nn.Module = Residual()
    randomise(network, seed=3)
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    return worm_dist.attach(
        model,
        SGD(model.parameters(), lr=0.05),
        WormConfig(search=search, truncation=truncation),
        example_inputs=random_images(1),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def _start(latest: str | None, total_steps: int | None, num_steps: int) -> int | None:
    """The step after which truncation starts; checks are three steps apart."""
    elbow = {**_NEVER, "latest": latest}
    truncation = {"removal": {"duration": "8ba", "fade_steps": 1}}
    engine = _attached({"every": "3ba", "window": 100, "elbow": elbow}, truncation, total_steps)
    for step in range(1, num_steps + 1):
        engine.optimizer.zero_grad()
        engine.model(random_images(4, seed=step)).square().mean().backward()
        engine.optimizer.step()
        if engine.check().elbow:
            assert engine.phase == "truncate"
            return step
    return None


@pytest.mark.parametrize(
    ("latest", "total_steps", "start"),
    [
        ("auto", 70, 9),  # the first check at or after step 7
        ("0.2dur", 30, 6),
        ("10ba", None, 12),
        ("auto", None, None),
        (None, 30, None),
    ],
)
def test_truncation_starts_at_the_first_check_after_the_latest_step(
    ranks: Ranks, latest: str | None, total_steps: int | None, start: int | None
) -> None:
    """On long epochs the rule fired at half of the training, and the run took two thirds of the
    dense network's operations."""
    assert ranks(2, _start, latest, total_steps, 15) == [start, start]


def test_a_single_process_starts_alike(ranks: Ranks) -> None:
    assert ranks(NO_GROUP, _start, "auto", 70, 15) == [9]


@pytest.mark.parametrize(
    ("search", "truncation", "said"),
    [
        ({"every": "0.1dur"}, {}, "search.every is 0.1dur, a share of the training; give total_st"),
        ({"elbow": {"latest": "0.1dur"}}, {}, "search.elbow.latest is 0.1dur, a share of the"),
        ({}, {"removal": {"duration": "0.3dur"}}, "truncation.removal.duration is 0.3dur, a share"),
        ({"every": "5ba"}, {}, "truncation.removal.duration is in epochs, but search.every is not"),
        (
            {"every": "5ba", "elbow": {"latest": "2ep"}},
            {"removal": {"duration": "8ba"}},
            "search.elbow.latest is in epochs, but search.every is not; give steps_per_epoch",
        ),
    ],
)
def test_lengths_that_are_not_known_are_refused(
    search: dict[str, Any], truncation: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"^attach: {said}"):
        _attached(search, truncation, total_steps=None)
    _attached(search, truncation, total_steps=100, steps_per_epoch=10)


def _differing() -> None:
    with pytest.raises(worm_dist.DivergenceError, match="setting of group total_steps"):
        _attached({}, {}, total_steps=100 + dist.get_rank())


def test_ranks_with_trainings_of_different_lengths_are_refused(ranks: Ranks) -> None:
    ranks(2, _differing)


@pytest.mark.parametrize(
    ("total_steps", "step", "duration"),
    [
        (10_000, 1000, 2000),  # a fifth of the training
        (10_000, 9000, 500),  # half of what is left
        (300, 30, 100),  # at least 100 steps
        (80, 8, 36),  # in a short training half of what is left: it ended without a ticket
        (None, 1000, 700),  # an epoch
    ],
)
def test_the_automatic_duration_fits_into_the_training(
    total_steps: int | None, step: int, duration: int
) -> None:
    schedule = CheckSchedule(Interval(1, "ep"), 700, total_steps)
    removal = Removal(
        RemovalConfig(), SingleProcessComm(), LossGuard(2.0), schedule.num_steps, total_steps
    )
    removal.start(torch.arange(4), step, torch.device("cpu"))
    assert removal.state_dict()["schedule"]["duration"] == duration
