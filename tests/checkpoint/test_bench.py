"""The benchmark of saves finds what it should find at all; how fast they are, no test says."""

from __future__ import annotations

import pytest

from tests.ranks import Ranks
from worm_dist.bench.checkpoint import checkpoint
from worm_dist.bench.results import Panel
from worm_dist.bench.workload import Workload

pytestmark = pytest.mark.slow("runs a benchmark, six seconds")


def _panel() -> Panel:
    return checkpoint(Workload("vgg_small", "vgg_small", rounds=2))


def test_saves_are_compared_with_none(ranks: Ranks) -> None:
    first, _ = ranks.outcomes(2, _panel)  # it waits for the disk
    assert first.exitcode == 0, first
    panel = first.value
    assert [row.name for row in panel.rows] == [
        "no save",
        "saved in between",
        "saved in the background",
    ]
    assert panel.rows[0].ratio.median == 1
    assert panel.figures["checkpoint (MB)"] > 2
    waits = [panel.figures[f"training waits, {row.name} (ms)"] for row in panel.rows]
    assert waits[0] < waits[1]
    assert Panel.from_json(panel.as_json()) == panel
