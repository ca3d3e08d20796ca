"""Attempt: what an earlier attempt left behind must not be taken for news.

torchrun's agent keeps one store for all attempts of its workers, and a rank that is there again
before rank zero would find in it where rank zero of the attempt before was listening.  The number
of restarts does not tell attempts apart either: each host counts its own.
"""

from __future__ import annotations

import json
import time
from uuid import uuid4

from torch._C._distributed_c10d import PrefixStore, Store

__all__ = ["part_of_this_attempt"]

_NAME = "worm_dist/attempt"
_SECONDS_BETWEEN_LOOKS = 0.05


def part_of_this_attempt(
    store: Store, rank: int, world_size: int, timeout_seconds: float
) -> PrefixStore:
    """A part of the store that only the ranks of this attempt use.  Every rank calls it.

    Rank zero gives the part a new name, collects a word from everybody under it, and repeats the
    words.  Whoever finds his own among them has spoken to the rank zero of today.

    Raises:
        RuntimeError: not all ranks came in time.
    """
    word = uuid4().hex
    if rank == 0:
        store.set(_NAME, word)
        words = [store.get(f"{word}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{word}/all", json.dumps(words))
        return PrefixStore(word, store)
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        name = store.get(_NAME).decode()
        store.set(f"{name}/{rank}", word)
        if store.check([f"{name}/all"]) and word in json.loads(store.get(f"{name}/all")):
            return PrefixStore(name, store)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise RuntimeError(f"rank zero did not answer within {timeout_seconds:g} seconds")
