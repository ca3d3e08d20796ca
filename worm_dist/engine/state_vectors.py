"""State vectors: whether the channels of a saved state fit the network and one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..groups.channel_groups import Groups
from ..groups.mask import Mask
from ..pruning.optimizer_transfer import kept_indices
from ..pruning.surgery import cuts_of
from ..verdict import Phase
from .dropped_channels import DroppedChannelsSchema

__all__ = ["complaints"]


def complaints(
    checks_dropped: Tensor,
    dropped: DroppedChannelsSchema,
    phase: Phase,
    groups: Groups,
    shapes: Mapping[str, torch.Size],
    removes: bool,
) -> Iterator[str]:
    """What is wrong with a state whose types are right, as ``key: reason``.

    Args:
        checks_dropped: the state's counts of checks, one for each channel.
        dropped: the state of the dropped channels.
        phase: the state's phase.
        groups: the channel groups of the dense network.
        shapes: the shapes of its parameters, by name.
        removes: whether the settings remove channels gradually.
    """
    dense = groups.num_channels
    yield from _sizes({"checks_dropped": checks_dropped, "dropped.removed": dropped.removed}, dense)
    if dropped.mask is not None:
        yield from _sizes({"dropped.mask": dropped.mask}, dense)
        if bool((dropped.mask & dropped.removed).any()):
            yield "dropped.mask: keeps a channel that dropped.removed has removed"
    if (phase is Phase.TICKET) != (dropped.truncation is None):
        yield f"dropped.truncation: contradicts phase {phase}"
    if phase in (Phase.TRUNCATE, Phase.TICKET) and dropped.mask is None:
        yield f"dropped.mask: missing, but the phase is {phase}"
    if phase is Phase.TICKET and not torch.equal(dropped.removed, ~torch.as_tensor(dropped.mask)):
        yield "dropped.removed: not what the mask drops, but the ticket was drawn"
    for name, left in groups.split(~dropped.removed).items():
        if not bool(left.any()):
            yield f"dropped.removed: nothing is left of group {name}"
    if dropped.truncation is not None:
        yield from _complaints_of_truncation(dropped, groups, shapes, removes)


def _complaints_of_truncation(
    dropped: DroppedChannelsSchema,
    groups: Groups,
    shapes: Mapping[str, torch.Size],
    removes: bool,
) -> Iterator[str]:
    """Of what is frozen in the network as it is after the channels removed so far."""
    assert dropped.truncation is not None
    where, kept = "dropped.truncation", ~dropped.removed
    yield from _sizes(
        {f"{where}.{key}": vector for key, vector in dropped.truncation.vectors().items()},
        int(kept.sum()),
    )
    for name, flags in (dropped.truncation.scales or {}).items():
        if name not in shapes or flags.shape != shapes[name]:
            yield f"{where}.scales.{name[:100]}: not the flags of a scale of this network"
    waiting = dropped.removal.schedule.waiting
    is_channel = bool(((waiting >= 0) & (waiting < kept.numel())).all())
    if not is_channel or waiting.unique().numel() < waiting.numel():
        yield "dropped.removal.schedule.waiting: not different channel indices"
    number = kept.cumsum(0) - 1
    if not bool((kept[waiting] & dropped.truncation.frozen[number[waiting]]).all()):
        yield "dropped.removal.schedule.waiting: a channel in it is not frozen"
    fade = dropped.truncation.fade
    if (fade is not None) != removes:
        yield f"{where}.fade: contradicts truncation.mode and truncation.frozen_weights"
    starts = (None if fade is None else fade.starts) or {}
    if fade is not None:
        under_way = torch.zeros_like(kept)
        under_way[kept] = fade.under_way
        missing = sorted(_scales_of(groups, under_way) - starts.keys())
        if missing:
            yield f"{where}.fade.starts: {missing[0]} is missing, whose fade is under way"
    sizes = {name: list(shape) for name, shape in shapes.items()}
    cuts = cuts_of(groups, Mask.from_vector(groups.sizes, kept), shapes)
    for name, along in kept_indices(cuts).items():
        for dim, indices in along.items():
            sizes[name][dim] = indices.numel()
    for name, start in starts.items():
        if list(start.shape) != sizes.get(name):
            yield (
                f"{where}.fade.starts.{name[:100]}: wanted {sizes.get(name, 'no such parameter')}, "
                f"found {list(start.shape)}"
            )


def _scales_of(groups: Groups, channels: Tensor) -> set[str]:
    """Names of the scales and shifts of these channels, bool ``[num_channels]``."""
    return {
        name
        for group, here in zip(groups, groups.split(channels).values())
        if bool(here.any())
        for member in group.zeroing_members
        for name, _ in member.parameters
    }


def _sizes(vectors: Mapping[str, Tensor], size: int) -> Iterator[str]:
    for name, vector in vectors.items():
        if vector.shape != (size,):
            yield f"{name}: wanted [{size}], found {list(vector.shape)}"
