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

from .channel_groups import Member

__all__ = ["interleaved"]


def interleaved(members: Sequence[Member], grouped: Mapping[str, _ConvNd]) -> list[Member] | str:
    """The members, grouped convolutions by the places within one of their groups where they read.

    Args:
        members: of one group of channels, each at the same places of all groups.
        grouped: the convolutions with several groups among them, by name; not depthwise ones.

    Returns:
        The members, or why the channels have to stay dense.
    """
    joined = []
    for member in members:
        convolution = grouped.get(member.module)
        if convolution is not None:
            if convolution.transposed:
                return f"{member.module}, a grouped transposed convolution, is not understood"
            width = _width(convolution, member.role)
            if width == 1:
                return f"{member.module}, a grouped convolution, has one channel in each group"
            local = _of_each_group(member.positions, convolution.groups, width)
            if local is None:
                return f"{member.module}, a grouped convolution, reads other channels too"
            if member.role == "consumer":  # its weight has one column for all its groups
                member = dataclasses.replace(member, positions=local)
        joined.append(member)
    return joined


def _width(convolution: _ConvNd, role: str) -> int:
    """Channels in each of its groups."""
    sides = {"producer": convolution.out_channels, "consumer": convolution.in_channels}
    return sides[role] // convolution.groups


def _of_each_group(positions: Tensor, num_groups: int, width: int) -> Tensor | None:
    """int64 ``[channels, k]``: places within a group; None if they are not the same in all."""
    if positions.shape[1] % num_groups:
        return None
    by_group = positions.sort(dim=1).values.unflatten(1, (num_groups, -1))
    local = by_group - width * torch.arange(num_groups)[:, None]
    alike = (local == local[:, :1]) & (local >= 0) & (local < width)
    return local[:, 0].contiguous() if bool(alike.all()) else None
