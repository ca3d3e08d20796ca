"""Rendezvous: wait in a store until all ranks of this attempt have joined.

A store that rank zero has opened ends with its process, so all its clients belong to one attempt.
torchrun's agent keeps one store for all attempts of its workers, and a rank that restarts sooner
than rank zero would find the previous rank zero's address in it.  The number of restarts does not
identify an attempt either: each host counts its own.
"""

from __future__ import annotations

import json
import time
from uuid import uuid4

from torch._C._distributed_c10d import PrefixStore, Store

from .diagnosis import ranks_are

__all__ = ["store_of_this_attempt", "wait_for_all_ranks"]

_JOINED, _FAILED, _CURRENT_PREFIX = "worm_dist/joined", "worm_dist/failed", "worm_dist/attempt"
_SECONDS_BETWEEN_POLLS = 0.1
_SECONDS_TO_READ = 2.0
"""Time for the other ranks to read the failure before rank zero and the store end."""


def wait_for_all_ranks(store: Store, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Wait until every rank has called this function.  Collective.

    Only rank zero watches the time, since the store ends with its process.

    Args:
        store: a store that rank zero hosts.
        rank: this process's rank.
        world_size: number of ranks.
        timeout_seconds: limit on the wait.

    Raises:
        RuntimeError: not all ranks joined in time; the message names those that did not.
    """
    keys = [f"{_JOINED}/{other}" for other in range(world_size)]
    store.set(keys[rank], "")
    deadline = time.monotonic() + timeout_seconds
    # Polls, because ``store.wait`` would log the keys that it waits for.
    while not store.check(keys):
        if rank == 0 and time.monotonic() > deadline:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            message = f"{ranks_are(missing)} not there after {timeout_seconds:g} seconds"
            store.set(_FAILED, message)
            time.sleep(_SECONDS_TO_READ)
            raise RuntimeError(message)
        if store.check([_FAILED]):
            raise RuntimeError(store.get(_FAILED).decode())
        time.sleep(_SECONDS_BETWEEN_POLLS)


def store_of_this_attempt(
    store: Store, rank: int, world_size: int, timeout_seconds: float
) -> PrefixStore:
    """Wait for every rank, in a view of the store that no other attempt uses.  Collective.

    Rank zero announces a new key prefix, collects a random token from every other rank under it,
    and publishes all tokens.  A rank that finds its own token among them has been answered by the
    rank zero of this attempt.

    Args:
        store: the store of torchrun's agent.
        rank: this process's rank.
        world_size: number of ranks.
        timeout_seconds: limit on the wait for rank zero.

    Returns:
        The view of the store.

    Raises:
        RuntimeError: rank zero did not answer in time, or the store timed out.
    """
    token = uuid4().hex
    if rank == 0:
        store.set(_CURRENT_PREFIX, token)
        tokens = [store.get(f"{token}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{token}/all", json.dumps(tokens))
        return PrefixStore(token, store)
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        prefix = store.get(_CURRENT_PREFIX).decode()
        store.set(f"{prefix}/{rank}", token)
        if store.check([f"{prefix}/all"]) and token in json.loads(store.get(f"{prefix}/all")):
            return PrefixStore(prefix, store)
        time.sleep(_SECONDS_BETWEEN_POLLS)
    raise RuntimeError(f"rank zero did not answer within {timeout_seconds:g} seconds")
