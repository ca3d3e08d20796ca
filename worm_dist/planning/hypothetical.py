"""Hypothetical masks: the channels that a forecast assumes to be dropped.

Scores are meaningless before training, as every scale of a new network is one.  So either every
group loses about the same share, or an existing ticket provides the mask.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import Groups
from ..groups.mask import Mask
from ..search.ranking import Ranking

__all__ = ["equal_shares", "mask_of_ticket"]


def equal_shares(ranking: Ranking, groups: Groups) -> Mask:
    """The mask that a search would select if all groups had the same distribution of scores.

    If norms are ranked separately, the same holds for every norm.  So all groups lose about the
    same share, except for the effects of minimum ratios, rounding and per-group ratios.

    Args:
        ranking: the ranking of these groups.
        groups: the channel groups of the dense network.
    """
    # All channels of a group cost the same, so it does not matter which of them rank highest.
    quantiles = [
        1 - (torch.arange(size, dtype=torch.float64) + 0.5) / size
        for size in ranking.sizes.values()
    ]
    none_lost = torch.zeros(groups.num_channels, dtype=torch.bool)
    _, mask, _ = ranking.select(torch.cat(quantiles), none_lost)
    return mask


class _Group(BaseModel):
    name: str
    num_channels: int
    kept: list[int]


class _Ticket(BaseModel):
    mask_digest: str
    groups: list[_Group]


def mask_of_ticket(folder: Path, groups: Groups) -> Mask:
    """Read the mask that a ticket was drawn with; its weights are not read.

    Args:
        folder: the ticket's folder.
        groups: the channel groups of the dense network.

    Raises:
        CheckpointError: the ticket does not exist or is damaged.
        ConfigError: it was drawn from another network.
    """
    path = folder / "ticket.json"
    try:
        ticket = _Ticket.model_validate(json.loads(path.read_bytes()))
        mask = Mask({group.name: _flags(group) for group in ticket.groups})
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; is this the folder of a ticket?"
        ) from error
    except (ConfigError, IndexError, RuntimeError, UnicodeDecodeError, ValueError) as error:
        text = str(error) if not isinstance(error, ValidationError) else error.errors()[0]["msg"]
        raise CheckpointError(f"{path}: not a ticket: {text}") from error
    if mask.digest != ticket.mask_digest:
        raise CheckpointError(f"{path}: damaged: its channels do not match its mask_digest")
    differing = sorted({name for name, _ in mask.sizes.items() ^ groups.sizes.items()})
    if differing:
        more = f" and {len(differing) - 1} more" if differing[1:] else ""
        raise ConfigError(
            f"--ticket: {folder} was drawn from another network: group {differing[0]}{more} "
            "differ; give the model, the input and the settings that it was trained with"
        )
    return Mask({group.name: mask[group.name] for group in groups})


def _flags(group: _Group) -> torch.Tensor:
    flags = torch.zeros(group.num_channels, dtype=torch.bool)
    flags[group.kept] = True
    return flags
