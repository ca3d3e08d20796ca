"""Interleaving: channels of grouped convolutions.

A convolution with several groups of its own must lose the same channels in each of them.  So what
is kept or dropped there is a channel of every one of these groups at once: with G groups of w
channels the channels i, w + i, 2w + i, ... are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from .groups import Member

__all__ = ["interleaved"]


def interleaved(members: Sequence[Member], grouped: Mapping[str, _ConvNd]) -> list[Member] | str:
    """The members with the channels of a convolution's groups taken together.

    Args:
        members: of one group of channels.
        grouped: the convolutions with several groups among them, by name; not depthwise ones.

    Returns:
        The members, or why the channels have to stay dense.
    """
    those = [member for member in members if member.module in grouped]
    first = those[0]
    if any(member.positions.shape[1] != 1 for member in those):
        return f"{first.module}, a grouped convolution, reads a channel at several places"
    width = _width(grouped[first.module], first.role)
    if width == 1:
        return f"{first.module}, a grouped convolution, has one channel in each of its groups"
    places = first.positions.flatten()
    if len(places) % width:
        return f"{first.module}, a grouped convolution, reads other channels too"
    together = torch.argsort(places % width, stable=True).view(width, -1)
    joined = []
    for member in members:
        positions = member.positions[together].flatten(1)
        if member.module in grouped:
            local = positions % _width(grouped[member.module], member.role)
            if not _complete(local, grouped[member.module].groups):
                return f"{member.module} is grouped otherwise than {first.module}"
            # Its weight has one column for all its groups.
            positions = local[:, :1] if member.role == "consumer" else positions
        joined.append(dataclasses.replace(member, positions=positions))
    return joined


def _width(convolution: _ConvNd, role: str) -> int:
    """Channels in each of its groups."""
    sides = {"producer": convolution.out_channels, "consumer": convolution.in_channels}
    return sides[role] // convolution.groups


def _complete(local: Tensor, num_groups: int) -> bool:
    """Whether each channel is the same one in all groups."""
    return local.shape[1] == num_groups and bool((local == local[:, :1]).all())
