"""Rank files: the engine's state beside a trainer's own files, one file for each rank."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from ..distributed.agreed_failure import refused_on_every_rank
from ..engine.attachment import context_of
from ..engine.engine import Engine
from ..errors import CheckpointError

__all__ = ["has_engine_state", "load_engine_state", "save_engine_state"]


def save_engine_state(engine: Engine, folder: str | Path) -> None:
    """Write this rank's state of the engine.  Collective.

    Args:
        engine: the engine.
        folder: the trainer's checkpoint; created if missing, as on hosts that do not share a disk.
    """
    state = engine.state_dict()
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(state, _path(folder, state["rank"]["number"]))


def has_engine_state(folder: str | Path) -> bool:
    """Whether a trainer's checkpoint holds a state of the engine, on the host of any rank.
    Collective in the default process group: where a file is missing on some hosts alone, all ranks
    load the state, which then names these ranks."""
    try:
        exists = _own_or_first(folder).exists()
    except OSError:  # the folder cannot be read
        exists = False
    if not dist.is_initialized():
        return exists
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, exists)
    return any(found)


def load_engine_state(engine: Engine, folder: str | Path) -> None:
    """Restore the engine from this rank's file, or from rank zero's.  Collective.

    Raises:
        CheckpointError: on every rank, if a file is missing or damaged, or does not fit the engine.
        See also ``Engine.load_state_dict``.
    """
    with refused_on_every_rank(context_of(engine).comm):
        path = _own_or_first(folder)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises errors of many types for damaged files
            raise CheckpointError(
                f"{path}: the engine's state cannot be read ({type(error).__name__}); resume from "
                "another checkpoint"
            ) from error
    engine.load_state_dict(state)


def _own_or_first(folder: str | Path) -> Path:
    own = _path(folder, dist.get_rank() if dist.is_initialized() else 0)
    return own if own.exists() else _path(folder, 0)


def _path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"worm_engine_{rank}.pt"
