"""Hypothetical masks: the channels that a forecast assumes to be dropped, and the network that is
left without them.

Scores are meaningless before training, as every scale of a new network is one.  So either every
group loses about the same share, or an existing ticket provides the mask.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from torch import nn

from ..errors import ConfigError
from ..groups.channel_groups import ChannelGroup, Groups, Member
from ..groups.gates import fold_gates
from ..groups.mask import Mask
from ..pruning.surgery import cuts_of, remove_channels, shapes_of
from ..ticket.metadata import read_metadata

__all__ = ["drawn", "mask_of_ticket"]


def mask_of_ticket(folder: Path, groups: Groups) -> Mask:
    """Read the mask that a ticket was drawn with; its weights are not read.

    Args:
        folder: the ticket's folder.
        groups: the channel groups of the dense network.

    Raises:
        CheckpointError: the ticket does not exist or is damaged.
        ConfigError: it was drawn from another network.
    """
    saved = {group.name: group for group in read_metadata(folder).groups}
    sizes = {name: group.num_channels for name, group in saved.items()}
    differing = sorted({name for name, _ in sizes.items() ^ groups.sizes.items()})
    if differing:
        more = f" and {len(differing) - 1} more" if differing[1:] else ""
        raise ConfigError(
            f"--ticket: {folder} was drawn from another network: group {differing[0]}{more} "
            "differ; give the model, the input and the settings that it was trained with"
        )
    return Mask({group.name: saved[group.name].keep for group in groups})


def drawn(network: nn.Module, groups: Groups, mask: Mask) -> tuple[nn.Module, Groups]:
    """Draw a copy of a network; gates are folded into the weights.

    Args:
        network: the dense network, not changed.
        groups: its channel groups.
        mask: the channels that are kept.

    Returns:
        The smaller copy, and the groups with the parameter names of the copy; their positions are
        still those of the dense network.

    Raises:
        ConfigError: the mask keeps no channel of a group.
    """
    ticket = copy.deepcopy(network)
    remove_channels(ticket, cuts_of(groups, mask, shapes_of(ticket)))
    fold_gates(ticket)
    return ticket, Groups([_ungated(group) for group in groups], groups.dense)


def _ungated(group: ChannelGroup) -> ChannelGroup:
    members = tuple(_folded(member) for member in group.members if member.role != "gate")
    return dataclasses.replace(group, members=members)


def _folded(member: Member) -> Member:
    parameters = tuple(
        (name.replace(".parametrizations.weight.original", ".weight"), dim)
        for name, dim in member.parameters
    )
    return dataclasses.replace(member, parameters=parameters)
