"""Newest checkpoint: found on whichever host has it, when an elastic launcher changes the ranks.

If a host is lost or a new one joins, another one may become rank zero's.  Without a shared disk the
checkpoints are then in the folder of that name on another rank's host, which reads the state for
all; see ``share_state``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lock import is_held
from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import Communicator, ProcessGroupComm
from ..distributed.init import RankInfo
from .run_config import RunConfig
from .run_folder import RunFolder, require_world_size, unfinished
from .shared_verification import damage_in_shards

__all__ = ["newest_checkpoint"]

logger = logging.getLogger(__name__)


def newest_checkpoint(
    out: Path,
    folder: RunFolder | None,
    config: RunConfig,
    rank_info: RankInfo,
    device: torch.device,
) -> tuple[int, Checkpoint | None]:
    """The rank that reads the state to resume from, rank zero wherever possible.  Collective.

    The ranks verify shards together.  If some are damaged, the checkpoint before is chosen.

    Args:
        out: the run's folder on this host.
        folder: the locked folder, on rank zero; None on other ranks.
        config: the run's settings.
        rank_info: this process's rank.
        device: the device on which collectives expect their tensors.

    Returns:
        The rank, the same on all ranks, and there the checkpoint; None for a new run and elsewhere.

    Raises:
        CheckpointError: this number of ranks cannot resume from it, all are damaged, or a folder
            cannot be read; raised on every rank.
    """
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, device)
    damaged: list[Path] = []
    while True:
        source, checkpoint = _chosen(out, folder, config, rank_info, device, comm, damaged)
        is_verified = folder is not None and folder.is_verified
        damage = damage_in_shards(None if is_verified else checkpoint, source, comm)
        if not damage:
            return source, checkpoint
        if checkpoint is not None:
            logger.warning("checkpoint %s is skipped: %s", checkpoint.path.name, damage)
            damaged.append(checkpoint.path)
        with refused_on_every_rank(comm):
            if checkpoint is not None and folder is not None:
                folder = folder.older(out, config, damaged)


def _chosen(
    out: Path,
    folder: RunFolder | None,
    config: RunConfig,
    rank_info: RankInfo,
    device: torch.device,
    comm: Communicator,
    damaged: Collection[Path],
) -> tuple[int, Checkpoint | None]:
    """See ``newest_checkpoint``; ``damaged`` are those on this host whose shards are damaged."""
    own = None if folder is None else folder.checkpoint
    # The name of the lock, by which the others see whether they share rank zero's disk.
    token = [folder.lease.token if folder is not None and folder.may_resume else ""]
    dist.broadcast_object_list(token, src=0, device=device)
    looks = rank_info.local_rank == 0 and rank_info.rank > 0 and token[0]
    with refused_on_every_rank(comm):
        if looks and not is_held(out, token[0]):
            own = unfinished(out, config, damaged)
    steps = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(rank_info.world_size)]
    dist.all_gather(steps, torch.tensor([-1 if own is None else own.step], device=device))
    found = torch.cat(steps).tolist()
    source = found.index(max(found))  # the lowest rank of those that have the newest
    if rank_info.rank != source:
        own = None
    with refused_on_every_rank(comm):
        if own is not None:
            require_world_size(config, rank_info.world_size, own)
    if source != 0 and rank_info.rank == 0:
        logger.warning(
            "%s: rank %d has a newer checkpoint on its host, of step %d, which all ranks resume "
            "from; journal and curves before it are there",
            out,
            source,
            found[source],
        )
    return source, own
