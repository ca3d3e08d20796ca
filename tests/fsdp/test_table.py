"""FSDP2 under what people set: a test for every cell of a table; a row runs once."""

from __future__ import annotations

import pytest

from tests.fsdp.row import COLUMNS, ROWS, Row
from tests.fsdp.run import run
from tests.ranks import Ranks
from tests.tables.runs import Runs

_COMPILES = pytest.mark.slow("compiles networks")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs[Row]:
    """What compiles runs by itself."""
    ranks = Ranks(tmp_path_factory.mktemp("fsdp"))
    return Runs(ranks, run, ROWS, most=3, alike=lambda row: row.compiled)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        pytest.param(name, column, marks=_COMPILES if row.compiled else ())
        for name, row in ROWS.items()
        for column in COLUMNS
        if column != "ddp" or row.ddp is not None
    ],
)
def test_cell(runs: Runs[Row], name: str, column: str) -> None:
    runs.look(name, column)
