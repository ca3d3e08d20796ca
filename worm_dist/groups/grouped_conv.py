"""Grouped convolutions: channels that repeat in every convolution group.

A grouped convolution must lose the same channels in each of its groups.  So one channel of a
channel group covers all of them: with G groups of w channels, i, w + i, 2w + i, ... are one.
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
    """Express the input positions of grouped convolutions as indices within one convolution group.

    Args:
        members: the members of one channel group.
        grouped: the network's grouped convolutions by name, without depthwise ones.

    Returns:
        The members, or the reason why the channels have to stay dense.
    """
    joined = []
    for member in members:
        convolution = grouped.get(member.module)
        if convolution is not None:
            if convolution.transposed:
                return f"{member.module}, a grouped transposed convolution, is not supported"
            width = _width(convolution, member.role)
            if width == 1:
                return f"{member.module}, a grouped convolution, has one channel in each group"
            local = _positions_in_group(member.positions, convolution.groups, width)
            if local is None:
                return f"{member.module}, a grouped convolution, reads other channels too"
            if member.role == "consumer":  # all convolution groups share the weight's columns
                member = dataclasses.replace(member, positions=local)
        joined.append(member)
    return joined


def _width(convolution: _ConvNd, role: str) -> int:
    """Return the number of channels in each convolution group."""
    sides = {"producer": convolution.out_channels, "consumer": convolution.in_channels}
    return sides[role] // convolution.groups


def _positions_in_group(positions: Tensor, num_groups: int, width: int) -> Tensor | None:
    """Return int64 ``[channels, k]``, the indices within a group; None if the groups differ."""
    if positions.shape[1] % num_groups:
        return None
    by_group = positions.sort(dim=1).values.unflatten(1, (num_groups, -1))
    local = by_group - width * torch.arange(num_groups)[:, None]
    equal = (local == local[:, :1]) & (local >= 0) & (local < width)
    return local[:, 0].contiguous() if bool(equal.all()) else None
