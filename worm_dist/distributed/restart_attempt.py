"""Isolates the store keys of one attempt from those of a previous one, under torchrun's restarts.

torchrun's agent keeps one store for all attempts of its workers, and a rank that restarts sooner
than rank zero would find the previous rank zero's address in it.  The number of restarts does not
identify an attempt either: each host counts its own.
"""

from __future__ import annotations

import json
import time
from uuid import uuid4

from torch._C._distributed_c10d import PrefixStore, Store

__all__ = ["store_of_this_attempt"]

_CURRENT_PREFIX = "worm_dist/attempt"
_SECONDS_BETWEEN_POLLS = 0.05


def store_of_this_attempt(
    store: Store, rank: int, world_size: int, timeout_seconds: float
) -> PrefixStore:
    """A view of the store that only the ranks of this attempt use.  Collective.

    Rank zero announces a new key prefix, collects a random token from every other rank under it,
    and publishes all tokens.  A rank that finds its own token among them has been answered by the
    rank zero of this attempt.

    Args:
        store: the store of torchrun's agent, which outlives the workers.
        rank: this process's rank.
        world_size: number of ranks.
        timeout_seconds: limit on the wait for rank zero.

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
