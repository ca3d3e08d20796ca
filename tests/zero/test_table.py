"""ZeRO's stages under what people set: a test for every cell of a table.

A row is run once and looked at from all sides.  Several share a call of the ranks: importing what
DeepSpeed wants costs each process as much as a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.matrix.findings import Findings
from tests.ranks import Outcome, Ranks
from tests.zero.row import COLUMNS
from tests.zero.rows import ROWS
from tests.zero.run import run

pytestmark = pytest.mark.slow("trains every row under DeepSpeed")

_ROWS_A_CALL = 4


def _calls() -> Iterator[tuple[str, ...]]:
    """The rows that share a call: of one stage, on as many ranks."""
    alike: dict[tuple[int, int], list[str]] = {}
    for name, row in ROWS.items():
        alike.setdefault((row.stage, row.world_size), []).append(name)
    for names in alike.values():
        for first in range(0, len(names), _ROWS_A_CALL):
            yield tuple(names[first : first + _ROWS_A_CALL])


_CALL_OF = {name: names for names in _calls() for name in names}


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Outcome]]:
    """How the ranks of a row ended; every row runs once."""
    ranks = Ranks(tmp_path_factory.mktemp("zero"))
    ended: dict[tuple[str, ...], list[Outcome]] = {}

    def outcomes_of(name: str) -> list[Outcome]:
        names = _CALL_OF[name]
        if names not in ended:
            size = ROWS[name].world_size
            ended[names] = ranks.outcomes(size, run, names)
        return ended[names]

    return outcomes_of


@pytest.mark.parametrize(
    ("name", "column"),
    [
        (name, column)
        for name, row in ROWS.items()
        for column in COLUMNS
        if row.why_not(column) is None
    ],
)
def test_cell(
    outcomes_of: Callable[[str], list[Outcome]],
    record_property: Callable[[str, Any], None],
    name: str,
    column: str,
) -> None:
    record_property("cell", (name, column))
    outcomes = outcomes_of(name)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    everyone: list[Findings] = [outcome.value[name] for outcome in outcomes]
    for rank, findings in enumerate(everyone):
        wrong = findings.wrong.get(column, [])
        assert not wrong, f"{len(wrong)} on rank {rank}:\n" + "\n".join(wrong[:5])
        if column != "agree":
            assert findings.num_comparisons[column], "nothing was compared"
    if column == "agree":
        first, *others = everyone
        assert first.weights and all(other.weights == first.weights for other in others)
