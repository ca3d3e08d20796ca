"""ZeRO's stages under what people set: a test for every cell of a table.

A row is run once and looked at from all sides.  Several share a call of the ranks: importing what
DeepSpeed wants costs each process as much as a row.
"""

from __future__ import annotations

import pytest

from tests.ranks import Ranks
from tests.tables.runs import Runs
from tests.zero.row import COLUMNS, Row
from tests.zero.rows import ROWS
from tests.zero.run import run

pytestmark = pytest.mark.slow("trains every row under DeepSpeed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs[Row]:
    ranks = Ranks(tmp_path_factory.mktemp("zero"))
    return Runs(ranks, run, ROWS, most=4, alike=lambda row: row.stage)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        (name, column)
        for name, row in ROWS.items()
        for column in COLUMNS
        if row.why_not(column) is None
    ],
)
def test_cell(runs: Runs[Row], name: str, column: str) -> None:
    runs.look(name, column)
