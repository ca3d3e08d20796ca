"""Attendance: no rank is alone in a collective that the training loop calls.

A loop that calls ``check`` on rank zero only lets that rank average scores while the others average
gradients: a hang, or sums of unlike things.  So ranks leave marks in the store of their process
group: whoever comes to such a call marks that it is there, and whoever begins another pass although
the call is due marks that it has gone past.  Each writes first and reads then, so of two ranks at
least one sees the other, and neither ever waits.  That costs two words with the store for each
check that is due, and nothing for a pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from ..errors import BackendError

__all__ = ["Attendance"]

_numbers = itertools.count()
"""Every rank attaches its engines in the same order, so they are numbered alike."""


class Attendance:
    """Marks of the ranks of one process group.

    Args:
        group: None if there is one process only.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._store: Store | None = None
        number = next(_numbers)
        if group is not None and dist.get_world_size(group) > 1:
            self._rank = dist.get_rank(group)
            store = dist.distributed_c10d._get_process_group_store(group)
            self._store = PrefixStore(f"worm_dist/{number}", store)

    def at(self, call: str, is_collective: bool = True) -> AbstractContextManager[None]:
        """A context in which the call's collectives run.

        Args:
            call: what every rank says alike, such as ``check at step 22``.
            is_collective: whether there are any.

        Raises:
            BackendError: another rank has gone past the call.
        """
        if self._store is None or not is_collective:
            return nullcontext()
        return self._at(call, self._store)

    @contextmanager
    def _at(self, call: str, store: Store) -> Iterator[None]:
        store.add(f"{call}: present", 1)
        _require_none_past(store, call)
        try:
            yield
        except BackendError:
            raise
        except RuntimeError:  # of a backend, when the rank that went past has ended
            _require_none_past(store, call)
            raise

    def go_past(self, call: str) -> None:
        """Begin another pass although the call is due.

        Raises:
            BackendError: another rank waits there.
        """
        if self._store is None:
            return
        self._store.add(f"{call}: gone past", 1)
        self._store.set(f"{call}: who", str(self._rank))
        if self._store.add(f"{call}: present", 0):
            raise BackendError(
                f"{call}: other ranks are in it, but rank {self._rank} has begun the next pass "
                "without calling it; every rank must call it, at the same place of the loop"
            )


def _require_none_past(store: Store, call: str) -> None:
    if store.add(f"{call}: gone past", 0):
        raise BackendError(
            f"{call}: rank {store.get(f'{call}: who').decode()} has begun the next pass without "
            "calling it; every rank must call it, at the same place of the loop"
        )
