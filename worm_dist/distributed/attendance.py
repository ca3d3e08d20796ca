"""Detects that only some ranks call a collective of the engine, before it hangs.

A training loop that calls ``check`` on rank zero only makes that rank average scores while the
others average gradients: a hang, an abort, or sums of unrelated tensors.  So ranks set marks in the
store of their process group: a rank that enters such a call marks that it is present, and waits for
the others before the first collective; a rank that begins another forward pass although the call is
due marks that it has skipped it.  Each writes before it reads, so of two ranks at least one sees
the other's mark.  That costs a few store operations for each check that is due, and nothing for a
pass.  Once all ranks are in a call, the marks of the call before it are deleted: all have left it.

A rank that has skipped a step does not know that the call is due.  It never comes, and after the
timeout of the group it is named.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from ..errors import BackendError
from .diagnosis import ranks_have
from .timeouts import timeout_of

__all__ = ["Attendance"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1
"""Seconds between two looks for the other ranks."""
_numbers = itertools.count()
"""Numbers of the engines; equal on all ranks, which attach them in the same order."""


class Attendance:
    """The marks of one engine, in the store of its process group.

    Args:
        group: the process group; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._store: Store | None = None
        self._num_calls = 0
        self._previous_keys: list[str] = []
        number = next(_numbers)
        if group is not None and dist.get_world_size(group) > 1:
            self._group = group
            self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
            store = dist.distributed_c10d._get_process_group_store(group)
            self._store = PrefixStore(f"worm_dist/{number}", store)

    def at(self, call: str, is_collective: bool = True) -> AbstractContextManager[None]:
        """A context in which the collectives of a call run, entered once all ranks are there.

        Args:
            call: name of the call, equal on all ranks, such as ``check at step 22``.
            is_collective: whether the call runs any collective.

        Raises:
            BackendError: another rank has skipped the call, or does not come within the timeout of
                the process group.
        """
        if self._store is None or not is_collective:
            return nullcontext()
        return self._at(call, self._store)

    @contextmanager
    def _at(self, call: str, store: Store) -> Iterator[None]:
        self._num_calls += 1
        # By its number too: ranks that differ in the name of a call would wait for one another.
        number = f"call {self._num_calls}"
        store.set(f"{number} of {self._rank}", "")
        store.add(f"{call}: present", 1)
        num_present = store.add(number, 1)
        began, pause = time.monotonic(), _SHORTEST_PAUSE
        while True:
            _require_not_skipped(store, call)
            if num_present == self._size:
                break
            seconds = time.monotonic() - began
            if seconds > timeout_of(self._group):
                raise self._not_all_came(store, call, number, seconds)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            num_present = store.add(number, 0)
        for key in self._previous_keys:
            store.delete_key(key)
        self._previous_keys = [f"{number} of {self._rank}"]
        if self._rank == 0:
            self._previous_keys += [number, f"{call}: present", f"{call}: skipped"]
        yield

    def _not_all_came(self, store: Store, call: str, number: str, seconds: float) -> BackendError:
        keys = [f"{number} of {rank}" for rank in range(self._size)]
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        return BackendError(
            f"{call}: {ranks_have(missing)} not come to it within {seconds:.3g} s; every rank must "
            "take every step, and call it at the same point of the loop"
        )

    def mark_skipped(self, call: str) -> None:
        """Mark that this rank begins another forward pass although the call is due.

        Args:
            call: name of the call, as in ``at``.

        Raises:
            BackendError: another rank is in the call.
        """
        if self._store is None:
            return
        # The name first: whoever sees the count must not wait for the name.
        self._store.set(f"{call}: skipped by", str(self._rank))
        self._store.add(f"{call}: skipped", 1)
        if self._store.add(f"{call}: present", 0):
            raise BackendError(
                f"{call}: other ranks are in it, but rank {self._rank} has begun the next pass "
                "without calling it; every rank must call it, at the same point of the loop"
            )


def _require_not_skipped(store: Store, call: str) -> None:
    if store.add(f"{call}: skipped", 0):
        rank = store.get(f"{call}: skipped by").decode()
        raise BackendError(
            f"{call}: rank {rank} has begun the next pass without calling it; every rank "
            "must call it, at the same point of the loop"
        )
