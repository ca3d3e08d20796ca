"""Bytes under ``fully_shard``, as the kernel counts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.test_bench import NETLAB, TORCHRUN, _call
from worm_dist.bench.report import read_panels

pytestmark = pytest.mark.slow("benchmarks sharded steps")


def test_what_has_left_is_neither_reduced_nor_gathered(tmp_path: Path) -> None:
    has_netlab = _call([*NETLAB, "true"], tmp_path).returncode == 0
    launcher = (*NETLAB, sys.executable) if has_netlab else TORCHRUN
    done = _call(
        [*launcher, "-m", "worm_dist", "bench", "wire", "--backend", "fsdp", "--quick"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    (panel,) = read_panels(tmp_path / "runs" / "bench-quick")
    assert [row.name for row in panel.rows] == ["fully_shard", "worm 50 %", "worm 50 %, left"]
    assert 0.6 < panel.figures["worm 50 % / dense"] < 0.75
    # A small network: padding and TCP's own bytes are more of it.
    assert 1 < panel.figures["worm 50 %, left / dense / live share"] < 1.12
