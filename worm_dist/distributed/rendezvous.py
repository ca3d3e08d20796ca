"""Rendezvous: wait in a store until all ranks of this attempt have joined, and agree on something.

A store that rank zero has opened ends with its process, so all its clients belong to one attempt.
torchrun's agent keeps one store for all attempts of its workers, and a rank that restarts sooner
than rank zero would find the previous rank zero's address in it.  The number of restarts does not
identify an attempt either: each host counts its own.

Only rank zero looks for the keys of all ranks.  The others look for one key, its answer, so that
the work of the store grows with the number of ranks and not with its square.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from uuid import uuid4

from torch._C._distributed_c10d import PrefixStore, Store

from ..errors import BackendError
from .diagnosis import ranks_are

__all__ = ["agree", "store_of_this_attempt"]

_JOINED, _ANSWER, _CURRENT_PREFIX = "worm_dist/joined", "worm_dist/answer", "worm_dist/attempt"
_SECONDS_BETWEEN_POLLS = 0.1
_SECONDS_TO_READ = 2.0
"""Time for the other ranks to read the failure before rank zero and the store end."""


def agree(
    store: Store,
    rank: int,
    world_size: int,
    own: str | BackendError,
    decide: Callable[[list[str]], str],
    timeout_seconds: float,
) -> str:
    """Wait for every rank, and let rank zero decide by what all of them say.  Collective.

    Args:
        store: a store that all ranks of this attempt share, and nobody else.
        rank: this process's rank.
        world_size: number of ranks.
        own: what this rank says; or why it cannot take part, which ends the start of all ranks
            without waiting for the others.
        decide: function that decides by the texts of all ranks; called on rank zero only.
        timeout_seconds: limit on the wait.

    Returns:
        The decision, the same on every rank.

    Raises:
        BackendError: ``decide`` has raised it, or a rank cannot take part; raised on every rank.
        RuntimeError: not all ranks joined in time; the message names those that did not.
    """
    deadline = time.monotonic() + timeout_seconds
    keys = [f"{_JOINED}/{other}" for other in range(world_size)]
    if isinstance(own, BackendError):
        _answer(store, refused=str(own))
    else:
        store.set(keys[rank], own)
    if rank == 0:
        _decide(store, keys, decide, deadline)
    # Rank zero answers in time, unless it is gone.
    _wait_for(store, [_ANSWER], deadline + _SECONDS_TO_READ, "rank zero did not answer")
    answer = json.loads(store.get(_ANSWER))
    if "decided" in answer:
        return str(answer["decided"])
    if rank == 0 and world_size > 1:
        time.sleep(_SECONDS_TO_READ)
    if "refused" in answer:
        raise BackendError(answer["refused"])
    raise RuntimeError(answer["missing"])


def _decide(
    store: Store, keys: list[str], decide: Callable[[list[str]], str], deadline: float
) -> None:
    """Rank zero's part of ``agree``: write the answer, unless another rank has."""
    began = time.monotonic()
    while not store.check([_ANSWER]):
        if store.check(keys):
            try:
                _answer(store, decided=decide([store.get(key).decode() for key in keys]))
            except BackendError as error:
                _answer(store, refused=str(error))
        elif time.monotonic() > deadline:
            _answer(store, missing=_missing(store, keys, deadline - began))
        else:
            time.sleep(_SECONDS_BETWEEN_POLLS)


def _missing(store: Store, keys: list[str], seconds: float) -> str:
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    return f"{ranks_are(missing)} not there after {seconds:.3g} seconds"


def _answer(store: Store, **answer: str) -> None:
    store.set(_ANSWER, json.dumps(answer))


def _wait_for(store: Store, keys: list[str], deadline: float, otherwise: str) -> None:
    """Wait for keys; polls, because ``store.wait`` would log them.

    Raises:
        RuntimeError: they are not there in time; says ``otherwise``.
    """
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
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
        RuntimeError: rank zero did not answer in time, or, on rank zero, others did not join; the
            message names them.
    """
    token = uuid4().hex
    deadline = time.monotonic() + timeout_seconds
    if rank == 0:
        keys = [f"{token}/{other}" for other in range(world_size)]
        store.set(keys[0], token)
        store.set(_CURRENT_PREFIX, token)
        while not store.check(keys):
            if time.monotonic() > deadline:
                raise RuntimeError(_missing(store, keys, timeout_seconds))
            time.sleep(_SECONDS_BETWEEN_POLLS)
        store.set(f"{token}/all", json.dumps([store.get(key).decode() for key in keys]))
        return PrefixStore(token, store)
    while time.monotonic() < deadline:
        if not store.check([_CURRENT_PREFIX]):
            time.sleep(_SECONDS_BETWEEN_POLLS)
            continue
        prefix = store.get(_CURRENT_PREFIX).decode()
        store.set(f"{prefix}/{rank}", token)
        if store.check([f"{prefix}/all"]) and token in json.loads(store.get(f"{prefix}/all")):
            return PrefixStore(prefix, store)
        time.sleep(_SECONDS_BETWEEN_POLLS)
    raise RuntimeError(f"rank zero did not answer within {timeout_seconds:g} seconds")
