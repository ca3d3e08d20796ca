"""The benchmark of memory counts allocations, and finds in each operation what it should."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks
from worm_dist.bench.memory import MemoryRow, measure, peak_bytes


def test_the_peak_is_that_of_what_is_alive_at_a_time() -> None:
    def operation() -> None:
        torch.empty(1000, dtype=torch.uint8)
        first = torch.empty(700, dtype=torch.uint8)
        second = torch.empty(600, dtype=torch.uint8)
        del first, second

    assert peak_bytes(operation) == (1300, 1000)


def _rows() -> list[MemoryRow]:
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
    warnings.simplefilter("ignore")  # of DeepSpeed's, at its import
    return list(measure("resnet20", "ZeRO-1"))


@pytest.mark.slow("imports DeepSpeed on every rank")
def test_a_save_takes_what_the_rank_holds(ranks: Ranks) -> None:
    pytest.importorskip("deepspeed")
    outcomes = ranks.outcomes(2, _rows)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    rows: dict[str, MemoryRow] = {row.operation: row for row in outcomes[0].value}
    assert list(rows) == ["attach", "check", "save, by all ranks", "save, by rank 0", "draw"]
    # Two moments of four bytes: copies of this rank's, or of all on rank zero.
    sharded, gathered = rows["save, by all ranks"], rows["save, by rank 0"]
    assert 4 <= sharded.rank_zero < 4.3 and 4 <= sharded.others < 4.3
    assert gathered.rank_zero >= 16 and gathered.others < 4.3
    assert rows["check"].others < 0.5
