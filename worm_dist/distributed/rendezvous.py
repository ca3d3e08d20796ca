"""Rendezvous: wait in the store until all ranks have joined, or name those that have not."""

from __future__ import annotations

import time

from torch._C._distributed_c10d import Store

from .diagnosis import ranks_are

__all__ = ["wait_for_all_ranks"]

_JOINED, _FAILED = "worm_dist/joined", "worm_dist/failed"
_SECONDS_BETWEEN_POLLS = 0.1
_SECONDS_TO_READ = 2.0


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
