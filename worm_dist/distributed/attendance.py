"""Detects that only some ranks call a collective of the engine, before it hangs.

A training loop that calls ``check`` on rank zero only makes that rank average scores while the
others average gradients: a hang, or sums of unrelated tensors.  So ranks set marks in the store of
their process group: a rank that enters such a call marks that it is present, and a rank that begins
another forward pass although the call is due marks that it has skipped it.  Each writes before it
reads, so of two ranks at least one sees the other's mark, and neither ever waits.  That costs two
store operations for each check that is due, and nothing for a pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from ..errors import BackendError, WormError

__all__ = ["Attendance"]

_numbers = itertools.count()
"""Numbers of the engines; equal on all ranks, which attach them in the same order."""


class Attendance:
    """The marks of one engine, in the store of its process group.

    Args:
        group: the process group; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._store: Store | None = None
        number = next(_numbers)
        if group is not None and dist.get_world_size(group) > 1:
            self._rank = dist.get_rank(group)
            store = dist.distributed_c10d._get_process_group_store(group)
            self._store = PrefixStore(f"worm_dist/{number}", store)

    def at(self, call: str, is_collective: bool = True) -> AbstractContextManager[None]:
        """A context in which the collectives of a call run.

        Args:
            call: name of the call, equal on all ranks, such as ``check at step 22``.
            is_collective: whether the call runs any collective.

        Raises:
            BackendError: another rank has skipped the call.
        """
        if self._store is None or not is_collective:
            return nullcontext()
        return self._at(call, self._store)

    @contextmanager
    def _at(self, call: str, store: Store) -> Iterator[None]:
        store.add(f"{call}: present", 1)
        _require_not_skipped(store, call)
        try:
            yield
        except WormError:
            raise
        except RuntimeError:  # raised by the backend when the rank that skipped it has ended
            with suppress(dist.DistError):  # the store may have ended with it
                _require_not_skipped(store, call)
            raise

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
