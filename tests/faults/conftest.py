from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.driver import Driver


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """``driver(world_size, run)``: how every rank ended."""
    return Driver(tmp_path)
