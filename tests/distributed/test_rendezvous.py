"""Ranks that torchrun has started anew meet one another, and nobody of an earlier attempt."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from worm_dist.distributed.rendezvous import store_of_this_attempt


@pytest.fixture
def agent() -> TCPStore:
    """The store that outlives the workers."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _written_and_read(agent: TCPStore, rank: int, delay: float, text: str) -> list[str]:
    """What a rank finds of the others, of whom each writes a text."""
    time.sleep(delay)
    seconds = timedelta(seconds=10)
    store = TCPStore("127.0.0.1", agent.port, is_master=False, timeout=seconds)
    part = store_of_this_attempt(store, rank, world_size=3, timeout_seconds=10)
    part.set(f"address/{rank}", text)
    return [part.get(f"address/{other}").decode() for other in range(3)]


@pytest.mark.parametrize("last", range(3))
def test_a_rank_that_is_early_waits_for_the_others_of_its_attempt(
    agent: TCPStore, last: int
) -> None:
    """A rank on a host that restarted sooner read rank zero's address of the attempt before, and
    could not connect: of six runs across two hosts whose rank was killed, four did not go on."""
    with ThreadPoolExecutor(3) as pool:
        for attempt in ("first", "second", "third"):
            delays = [0.3 if rank == last else 0.0 for rank in range(3)]
            calls = [
                pool.submit(_written_and_read, agent, rank, delays[rank], f"{attempt} {rank}")
                for rank in range(3)
            ]
            whole = [f"{attempt} {rank}" for rank in range(3)]
            assert [call.result(timeout=10) for call in calls] == [whole] * 3


def test_an_attempt_that_was_not_complete_leaves_nothing(agent: TCPStore) -> None:
    """A rank was killed before all had met."""
    agent.set("worm_dist/attempt", "old")
    agent.set("old/1", "word")
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(_written_and_read, agent, rank, 0.2 if rank == 0 else 0.0, str(rank))
            for rank in range(3)
        ]
        assert [call.result(timeout=10) for call in calls] == [["0", "1", "2"]] * 3


def test_a_rank_zero_that_never_answers_is_told(agent: TCPStore) -> None:
    agent.set("worm_dist/attempt", "old")
    agent.set("old/all", '["of the attempt before"]')
    with pytest.raises(RuntimeError, match=r"rank zero did not answer within 0\.2 seconds"):
        store_of_this_attempt(agent, rank=1, world_size=2, timeout_seconds=0.2)
