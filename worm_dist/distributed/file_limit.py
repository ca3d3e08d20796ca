"""The limit on open files, which are also connections: each rank has some to each other rank."""

from __future__ import annotations

import resource

from ..errors import BackendError

__all__ = ["needed_file_descriptors", "require_file_descriptors"]

_PER_RANK, _PER_RANK_ON_RANK_ZERO = 1, 3
"""Connections to each rank: those of gloo; on rank zero also those of store and monitor.  Counted
with 2, 4 and 8 ranks: 13 + 1 a rank, and 24 + 3 a rank on rank zero."""
_FOR_ITSELF = 64
_SPARE = 1024
"""For loader processes and further process groups, where the hard limit permits."""


def needed_file_descriptors(rank: int, world_size: int) -> int:
    """The number of open files that a rank needs in a run of so many ranks."""
    per_rank = _PER_RANK_ON_RANK_ZERO if rank == 0 else _PER_RANK
    return _FOR_ITSELF + per_rank * world_size


def require_file_descriptors(rank: int, world_size: int) -> None:
    """Raise this process's soft limit on open files to what a run of so many ranks needs.

    Args:
        rank: this process's rank.
        world_size: number of ranks.

    Raises:
        BackendError: the hard limit is below that; the message says what is needed.
    """
    if world_size == 1:
        return
    needed = needed_file_descriptors(rank, world_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unlimited = hard == resource.RLIM_INFINITY
    if not is_unlimited and hard < needed:
        raise BackendError(
            f"launch: rank {rank} of {world_size} needs {needed} file descriptors, most of them "
            f"for its connections, but its hard limit is {hard}; raise it where the rank is "
            f"started (ulimit -Hn {needed}, docker run --ulimit nofile={needed}, LimitNOFILE=)"
        )
    wanted = needed + _SPARE if is_unlimited else min(hard, needed + _SPARE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
