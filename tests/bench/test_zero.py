"""Bytes under DeepSpeed, as the kernel counts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.test_bench import NETLAB, TORCHRUN, _call
from worm_dist.bench.report import read_panels

pytestmark = pytest.mark.slow("benchmarks steps under DeepSpeed")


def test_half_of_the_rows_is_half_of_the_bytes_in_every_stage(tmp_path: Path) -> None:
    has_netlab = _call([*NETLAB, "true"], tmp_path).returncode == 0
    launcher = (*NETLAB, sys.executable) if has_netlab else TORCHRUN
    done = _call([*launcher, "-m", "worm_dist", "bench", "zero", "--quick"], tmp_path)
    assert done.returncode == 0, done.stderr
    (panel,) = read_panels(tmp_path / "runs" / "bench-quick")
    assert [row.name for row in panel.rows] == [
        *(name for stage in range(4) for name in (f"ZeRO-{stage}", f"worm 50 %, ZeRO-{stage}")),
        "worm 50 %, ZeRO-3, faded",
    ]
    for stage in (0, 1, 2):
        # A small network: norms, which are told whole, and TCP's own bytes are more of it.
        assert 0.48 < panel.figures[f"ZeRO-{stage}, half of the rows / dense"] < 0.58
    # Weights are gathered twice in a step, in full until the channels are zero.
    assert 0.6 < panel.figures["ZeRO-3, half of the rows / dense"] < 0.8
    assert 0.25 < panel.figures["ZeRO-3, half of the rows, faded / dense"] < 0.3
