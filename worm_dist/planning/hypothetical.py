"""Dropping: which channels a plan takes for dropped.

Nothing is known of scores before a training: every scale of a new network is one.  So either every
group loses about the same share, or a ticket that has been drawn says.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import Groups
from ..search.mask import Mask
from ..search.ranking import Ranking

__all__ = ["equal_shares", "mask_of_ticket"]


def equal_shares(ranking: Ranking, groups: Groups) -> Mask:
    """The mask that a search would cut if the scores of every group, or of every norm where those
    are ranked by themselves, were spread alike.

    So all groups lose about the same share, but for what the settings say of floors, rounding and
    ratios of single groups.

    Args:
        ranking: of these groups.
        groups: of the dense network.
    """
    # All channels of a group cost the same, so the first ones may as well be the best.
    quantiles = [
        1 - (torch.arange(size, dtype=torch.float64) + 0.5) / size
        for size in ranking.sizes.values()
    ]
    nothing_lost = torch.zeros(groups.num_channels, dtype=torch.bool)
    _, mask, _ = ranking.select(torch.cat(quantiles), nothing_lost)
    return mask


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
            "give the model, the input and the settings that it was trained with"
        )
    return Mask({group.name: mask[group.name] for group in groups})


def _flags(group: _Group) -> torch.Tensor:
    flags = torch.zeros(group.num_channels, dtype=torch.bool)
    flags[group.kept] = True
    return flags
