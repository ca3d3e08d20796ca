"""Ranks meet one another, and nobody of an earlier attempt, and agree."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from worm_dist.distributed.rendezvous import agree, store_of_this_attempt
from worm_dist.errors import BackendError


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


def test_a_rank_that_torchrun_has_not_started_is_named(agent: TCPStore) -> None:
    """torch named a key of its store."""
    with pytest.raises(RuntimeError, match=r"rank 1 is not there after 0\.2 seconds"):
        store_of_this_attempt(agent, rank=0, world_size=2, timeout_seconds=0.2)


class _Counting:
    """A store that counts the keys that one rank asks for.

    Args:
        port: of the real one.
    """

    def __init__(self, port: int) -> None:
        self._store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
        self.polls = 0
        self.keys = 0

    def check(self, keys: list[str]) -> bool:
        self.polls += 1
        self.keys += len(keys)
        return self._store.check(keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _agree(store: Any, rank: int, world_size: int, own: str | BackendError) -> str:
    """What a rank is told."""
    try:
        return agree(store, rank, world_size, own, _decide, timeout_seconds=1)
    except BackendError as error:
        return f"refused: {error}"
    except RuntimeError as error:
        return str(error)


def _decide(texts: list[str]) -> str:
    if "odd" in texts:
        raise BackendError("an odd one")
    return ", ".join(texts)


def _agreed(agent: TCPStore, *said: str | BackendError, world_size: int) -> list[str]:
    with ThreadPoolExecutor(world_size) as pool:
        calls = [
            pool.submit(_agree, _Counting(agent.port), rank, world_size, own)
            for rank, own in enumerate(said)
        ]
        return [call.result(timeout=10) for call in calls]


@pytest.fixture(autouse=True)
def _nobody_reads_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worm_dist.distributed.rendezvous._SECONDS_TO_READ", 0.3)


def test_all_are_told_what_rank_zero_decides(agent: TCPStore) -> None:
    assert _agreed(agent, "a", "b", "c", world_size=3) == ["a, b, c"] * 3


def test_all_are_told_that_it_cannot_be_decided(agent: TCPStore) -> None:
    assert _agreed(agent, "a", "odd", world_size=2) == ["refused: an odd one"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_who_cannot_take_part_ends_all_at_once(agent: TCPStore, rank: int) -> None:
    """Although a third one has not come."""
    said: list[str | BackendError] = ["fine", "fine"]
    said[rank] = BackendError("too few files")
    began = time.monotonic()
    assert _agreed(agent, *said, world_size=3) == ["refused: too few files"] * 2
    assert time.monotonic() - began < 1


def test_who_has_not_come_is_named_to_all(agent: TCPStore) -> None:
    first, second = _agreed(agent, "a", "b", world_size=4)
    assert first == second
    assert re.fullmatch(r"ranks 2 and 3 are not there after [\d.]+ seconds", first)


def test_the_store_is_not_asked_for_every_rank_by_every_rank(agent: TCPStore) -> None:
    """Each of N ranks polled the keys of all N: at 1,024 ranks a million keys each tenth of a
    second."""
    store = _Counting(agent.port)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(_agree, store, 1, 1000, "fine")
        time.sleep(0.5)
        agent.set("worm_dist/answer", '{"decided": "x"}')
        assert call.result(timeout=10) == "x"
    assert store.keys == store.polls > 1
