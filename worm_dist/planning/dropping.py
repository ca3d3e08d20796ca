"""Dropping: which channels a plan takes for dropped.

Nothing is known of scores before a training: every scale of a new network is one.  So either every
group loses the same share, or a ticket that has been drawn says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError, ConfigError
from ..search.groups import Groups
from ..search.mask import Mask

__all__ = ["equal_shares", "mask_of_ticket"]


def equal_shares(sizes: Mapping[str, int], prune_ratio: float) -> Mask:
    """Every group loses ``prune_ratio`` of its channels, rounded down, but never the last one.  A
    run drops that share of all groups together.

    Args:
        sizes: channels of each group.
        prune_ratio: share of them to drop, below one.
    """
    keep = {}
    for name, size in sizes.items():
        # Rounded as the search does: 0.29 of 100 channels are 28.999999999999996 in floats.
        num_kept = max(1, size - int(round(prune_ratio * size, 9)))
        # All channels of a group cost the same.
        keep[name] = torch.arange(size) < num_kept
    return Mask(keep)


class _Group(BaseModel):
    name: str
    num_channels: int
    kept: list[int]


class _Ticket(BaseModel):
    mask_digest: str
    groups: list[_Group]


def mask_of_ticket(folder: Path, groups: Groups) -> Mask:
    """The mask that a ticket was drawn with; its weights are not looked at.

    Raises:
        CheckpointError: there is no ticket, or it is damaged.
        ConfigError: it was drawn from another network.
    """
    path = folder / "ticket.json"
    try:
        ticket = _Ticket.model_validate(json.loads(path.read_bytes()))
        mask = Mask({group.name: _flags(group) for group in ticket.groups})
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; is it a ticket?") from error
    except (ConfigError, IndexError, RuntimeError, UnicodeDecodeError, ValueError) as error:
        text = str(error) if not isinstance(error, ValidationError) else error.errors()[0]["msg"]
        raise CheckpointError(f"{path}: not a ticket: {text}") from error
    if mask.digest != ticket.mask_digest:
        raise CheckpointError(f"{path}: its channels are not those of its mask_digest; damaged")
    odd = sorted({name for name, _ in mask.sizes.items() ^ groups.sizes.items()})
    if odd:
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        raise ConfigError(
            f"--ticket: {folder} was drawn from another network: group {odd[0]}{more} differ; "
            "give the model and the input that it was trained with"
        )
    return Mask({group.name: mask[group.name] for group in groups})


def _flags(group: _Group) -> torch.Tensor:
    flags = torch.zeros(group.num_channels, dtype=torch.bool)
    flags[group.kept] = True
    return flags
