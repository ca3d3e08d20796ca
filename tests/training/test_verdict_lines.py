from __future__ import annotations

from typing import Any

import pytest
import torch

from worm_dist import Mask, WormConfig
from worm_dist.search.convergence import History
from worm_dist.training.reporting.verdict_lines import elbow_line


@pytest.mark.parametrize(
    ("preset", "truncation", "said"),
    [
        (
            "worm",
            {},
            "dropped channels get no gradients any more, and the channels leave one after another",
        ),
        ("worm", {"frozen_weights": "hold"}, "dropped channels get no gradients any more"),
        (
            "worm-paper",
            {},
            "gradients of the scales and shifts that the masks drop are multiplied by 0.003",
        ),
        (
            "worm-paper",
            {"ratio": "distance"},
            "gradients of the scales and shifts that the masks drop are multiplied by their "
            "distance",
        ),
    ],
)
def test_the_elbow_says_what_truncation_does(
    preset: str, truncation: dict[str, Any], said: str
) -> None:
    config = WormConfig.preset(preset, truncation=truncation, search={"elbow": {"min_masks": 1}})
    record = History(config.search).record(0, Mask({"only": torch.arange(4) < 2}), ())
    line = elbow_line(1.5, record, config.search, config.truncation)
    assert line == f"elbow at epoch 1.5 (rule margin): truncation starts, {said}"
