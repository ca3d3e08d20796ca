"""A run without a ticket says why, with the numbers that decided it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from worm_dist.groups.mask import Mask
from worm_dist.search.convergence import CheckRecord, History
from worm_dist.training.reporting.not_found import why_not_found
from worm_dist.training.reporting.result import Result
from worm_dist.training.run_config import RunConfig

_HOLD = {"frozen_weights": "hold"}
_OFF: dict[str, Any] = {"preset": "early-bird"}
_CASES: dict[str, tuple[dict[str, Any], int, dict[str, float], str]] = {
    "never checked": (
        {"search": {"every": "30ep"}},
        0,
        {},
        "no check in 20 epochs; search.every is 30ep, so check more often, or train for more",
    ),
    "too few masks": (
        {},
        2,
        {},
        "no elbow in 2 checks: no rule applies before search.elbow.min_masks, 3; check more often",
    ),
    "mean distance": (
        {},
        4,
        {},
        "no elbow in 4 checks: at the last one the mean distance of the masks was 0.667, and must "
        "be below 0.150; train for more epochs, or set search.elbow.margin higher",
    ),
    "relative to the largest": (
        {"search": {"elbow": {"rule": "relative", "fraction": 0.5}}},
        4,
        {},
        "was 0.667, and must be below 0.500; train for more epochs, or set search.elbow.fraction",
    ),
    "no knee": (
        {"search": {"elbow": {"rule": "kneedle"}}},
        4,
        {},
        "the rule kneedle has found no knee in the mean distances, the last of which was 0.667",
    ),
    "window, nothing truncated": (
        _OFF,
        4,
        {},
        "no ticket: the window has only 4 of search.window's 5 masks; check more often",
    ),
    "distances, nothing truncated": (
        _OFF,
        7,
        {},
        "no ticket: the masks have not settled: at the last check the largest distance was 1.000, "
        "and must not be above search.settled, 0.1;",
    ),
    "distances, after the elbow": (
        {"truncation": _HOLD},
        7,
        {"elbow_epoch": 3.0},
        "truncation started at epoch 3, but the masks have not settled",
    ),
    "removal": (
        {},
        7,
        {"elbow_epoch": 3.0, "removed_fraction": 0.4},
        "truncation started at epoch 3, and 40% of the dropped channels had been removed when "
        "training ended; raise epochs and --resume from the newest checkpoint, or set truncation",
    ),
}


def _history(config: RunConfig, num_checks: int) -> tuple[CheckRecord, ...]:
    """Two masks that take turns: every second distance is 1."""
    history = History(config.search)
    for number in range(num_checks):
        keep = torch.tensor([number % 2 == 0, number % 2 == 1])
        history.record(number, Mask({"conv": keep}), ())
    return history.records


@pytest.mark.fault(37, "no ticket, for each reason")
@pytest.mark.parametrize("case", list(_CASES))
def test_a_run_without_a_ticket_says_why(case: str) -> None:
    """It said that there was no elbow, or that the mask had not settled, whatever the reason."""
    settings, num_checks, figures, says = _CASES[case]
    config = RunConfig(**settings)
    result = Result(preset="worm", seed=0, world_size=1, backend="gloo", data="", **figures)  # type: ignore[arg-type]
    reason = why_not_found(result, config, _history(config, num_checks))
    assert re.search(re.escape(says), reason), reason
