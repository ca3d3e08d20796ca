"""FSDP2 under what people set: a test for every cell of a table; a row runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fsdp.row import COLUMNS, ROWS
from tests.fsdp.run import run
from tests.matrix.findings import Findings
from tests.ranks import Outcome, Ranks

_ROWS_A_CALL = 3
_COMPILES = pytest.mark.slow("compiles networks")


def _calls() -> Iterator[tuple[str, ...]]:
    """The rows that share a call: on as many ranks, and what compiles by itself."""
    alike: dict[tuple[int, str], list[str]] = {}
    for name, row in ROWS.items():
        alike.setdefault((row.world_size, row.compiled), []).append(name)
    for names in alike.values():
        for first in range(0, len(names), _ROWS_A_CALL):
            yield tuple(names[first : first + _ROWS_A_CALL])


_CALL_OF = {name: names for names in _calls() for name in names}


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Outcome]]:
    """How the ranks of a row ended; every row runs once."""
    ranks = Ranks(tmp_path_factory.mktemp("fsdp"))
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
        pytest.param(name, column, marks=_COMPILES if row.compiled else ())
        for name, row in ROWS.items()
        for column in COLUMNS
        if column != "ddp" or row.ddp is not None
    ],
)
def test_cell(outcomes_of: Callable[[str], list[Outcome]], name: str, column: str) -> None:
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
