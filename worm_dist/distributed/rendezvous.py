"""Meeting: all ranks are there, or it is known who is not."""

from __future__ import annotations

import time

from torch._C._distributed_c10d import Store

from .diagnosis import ranks_named

__all__ = ["meet"]

_HERE, _MISSED = "worm_dist/here", "worm_dist/missed"
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_READ = 2.0


def meet(store: Store, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Wait for all ranks.  Every rank calls it, in a store that rank zero keeps.

    Rank zero alone looks at the time: when it leaves, the store goes with it.

    Raises:
        RuntimeError: not all came in time; names those who did not.
    """
    keys = [f"{_HERE}/{other}" for other in range(world_size)]
    store.set(keys[rank], "")
    deadline = time.monotonic() + timeout_seconds
    # Not by waiting in the store: it would log what it waits for.
    while not store.check(keys):
        if rank == 0 and time.monotonic() > deadline:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            said = f"{ranks_named(missing)} not there after {timeout_seconds:g} seconds"
            store.set(_MISSED, said)
            time.sleep(_SECONDS_TO_READ)
            raise RuntimeError(said)
        if store.check([_MISSED]):
            raise RuntimeError(store.get(_MISSED).decode())
        time.sleep(_SECONDS_BETWEEN_LOOKS)
