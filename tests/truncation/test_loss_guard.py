"""Whether the training loss lets further channels leave."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worm_dist.truncation.loss_guard import Decision, LossGuard


def _levels(first: float, smoothed: float, watched: float = 1.0) -> Tensor:
    return torch.tensor([first, smoothed, watched])


@pytest.mark.parametrize(
    ("first", "level", "limit"),
    [
        (2.3, 1.0, 1.5),  # half more than at the elbow
        (2.3, 0.02, 0.02 + 0.1 * 2.28),  # a tenth of the way back, where that is more
        (0.4, 0.4, 0.6),  # nothing has been learnt since attach: a network that was trained before
        (-1.0, -3.0, -2.8),  # a loss may be below zero
    ],
)
def test_the_limit_is_a_multiple_or_a_share_of_the_progress(
    first: float, level: float, limit: float
) -> None:
    guard = LossGuard(pause_above=1.5)
    guard.start(_levels(first, level))
    assert guard.limit == pytest.approx(limit)
    assert guard.watches
    below, above = _levels(first, limit - 0.001), _levels(first, limit + 0.001)
    assert guard.decide(below, 10, patience=5) is Decision.GO_ON
    assert guard.decide(above, 10, patience=5) is Decision.PAUSE
    assert guard.decide(_levels(first, math.nan), 10, patience=5) is Decision.PAUSE


def test_a_pause_that_does_not_help_stops_the_removal() -> None:
    guard = LossGuard(pause_above=2)
    guard.start(_levels(2.0, 1.0))
    high = _levels(2.0, 2.5)
    for step, expected in ((10, Decision.PAUSE), (29, Decision.PAUSE), (30, Decision.STOP)):
        decision = guard.decide(high, step, patience=20)
        assert decision is expected
        guard.follow(decision, step)
    assert guard.paused_at == 10
    guard.follow(Decision.GO_ON, 31)
    assert guard.paused_at is None


def test_where_no_rank_or_not_every_rank_tells_a_loss_nothing_is_judged() -> None:
    guard = LossGuard(pause_above=2)
    for watched in (0.0, 0.5):
        guard.start(_levels(2.0, 1.0, watched))
        assert not guard.watches


def test_losses_of_several_passes_are_one_steps() -> None:
    guard = LossGuard(pause_above=2)
    assert guard.levels(torch.device("cpu")).tolist() == [0, 0, 0]
    guard.watch(torch.tensor(1.0))
    guard.watch(torch.tensor(3.0))
    guard.after_step(1)
    guard.after_step(2)  # a step without a loss changes nothing
    assert guard.levels(torch.device("cpu")).tolist() == [2, 2, 1]
    guard.watch(torch.tensor(4.0))
    guard.after_step(3)
    first, smoothed, watched = guard.levels(torch.device("cpu")).tolist()
    assert (first, watched) == (2, 1)
    assert smoothed == pytest.approx(0.95 * 2 + 0.05 * 4)
    again = LossGuard(pause_above=2)
    again.load_rank_state(guard.rank_state(), torch.device("cpu"))
    assert again.levels(torch.device("cpu")).equal(guard.levels(torch.device("cpu")))
