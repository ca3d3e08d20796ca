"""Shared verification: the ranks verify the shards of a checkpoint together, before it is loaded.

One rank has verified all other files when it chose the checkpoint.  The shards are most of its
bytes; each rank that sees them hashes an equal part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import manifest_digest
from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import Communicator
from ..errors import CheckpointError

__all__ = ["damage_in_shards"]


def damage_in_shards(checkpoint: Checkpoint | None, source: int, comm: Communicator) -> str:
    """Verify the shards of the checkpoint that is about to be loaded.  Collective.

    Args:
        checkpoint: the checkpoint, on the rank that has chosen it; None elsewhere, and if there is
            none.
        source: that rank, the same on all ranks.
        comm: the communicator of all ranks.

    Returns:
        What is damaged, and which ranks found it; the same on every rank, and empty if nothing is.

    Raises:
        CheckpointError: the manifest cannot be read any more; raised on every rank.
    """
    own = None
    with refused_on_every_rank(comm):
        if checkpoint is not None and checkpoint.shards:
            own = str(checkpoint.path.absolute()), manifest_digest(checkpoint.path)
    chosen: list[tuple[str, str] | None] = [own]
    dist.broadcast_object_list(chosen, src=source)
    if chosen[0] is None:
        return ""
    if dist.get_rank() != source:
        checkpoint = _same(*chosen[0])
    found = [False] * comm.size
    dist.all_gather_object(found, checkpoint is not None)
    readers = [rank for rank, sees_it in enumerate(found) if sees_it]
    failure = "" if checkpoint is None else _damage(checkpoint, readers)
    return "; ".join(comm.failures(failure))


def _same(path: str, digest: str) -> Checkpoint | None:
    """The checkpoint; None if this rank does not see the same one there."""
    try:
        return Checkpoint(path) if manifest_digest(Path(path)) == digest else None
    except CheckpointError:
        return None


def _damage(checkpoint: Checkpoint, readers: Sequence[int]) -> str:
    """What is damaged in this rank's part of the shards."""
    first = readers.index(dist.get_rank())
    try:
        checkpoint.verify(checkpoint.shards[first :: len(readers)])
    except CheckpointError as error:
        return str(error)
    return ""
