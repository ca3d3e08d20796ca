"""Stage 3 where the ranks' elements are sent in equal chunks, as where padding costs more."""

from __future__ import annotations

import pytest

from tests.ranks import Ranks
from tests.tables.findings import Findings
from tests.zero.rows import ROWS
from tests.zero.run import run
from worm_dist.comm_hooks import shares

pytestmark = pytest.mark.slow("trains rows of the table under DeepSpeed")

_ROWS = {2: ("3: bf16, gathered late, a frozen shift",), 3: ("3: 3 ranks",)}


def _never_padded(names: tuple[str, ...]) -> dict[str, Findings]:
    vars(shares)["_BYTES_OF_A_COLLECTIVE"] = 0
    return run(names)


@pytest.mark.parametrize("world_size", _ROWS)
def test_all_but_the_bytes_is_as_with_padding(ranks: Ranks, world_size: int) -> None:
    names = _ROWS[world_size]
    outcomes = ranks.outcomes(world_size, _never_padded, names)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    for name in names:
        assert ROWS[name].world_size == world_size
        everyone: list[Findings] = [outcome.value[name] for outcome in outcomes]
        for findings in everyone:
            wrong = {column: text for column, text in findings.wrong.items() if column != "bytes"}
            assert not wrong
        assert all(other.weights == everyone[0].weights for other in everyone)
