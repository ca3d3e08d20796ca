"""Draws a copy of a network with a mask, and locates the channel groups in it."""

from __future__ import annotations

import copy
import dataclasses

from torch import nn

from ..groups.channel_groups import ChannelGroup, Groups, Member
from ..groups.gates import fold_gates
from ..groups.mask import Mask
from ..pruning.surgery import cuts_of, remove_channels, shapes_of

__all__ = ["drawn"]


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
