"""Fade: the way of channels' scales from where they were to exact zero.

Step a of N leaves (N - a) / N of the value at the start.  Geometric fades are unsafe: the norm
amplifies a channel again however small its scale is, and a layer may come to live on its fading
channels alone.  Only exact zero is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.full_state import part_of
from ..backends.optimizer_view import OptimizerView, Owners, Shard
from ..distributed.collectives import Communicator
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import Block, FreezePlan

__all__ = ["NEVER", "Fade"]

NEVER = 2**62
"""A step that does not come."""


class Fade:
    """Writes what scales frozen channels after every step: in full, less and less, or zero.

    What it costs does not depend on how many channels have begun, or when.

    Args:
        stepping: steps the slices.
        num_channels: of the network.
        num_steps: from the beginning to zero.

    Attributes:
        over_at: int64 ``[num_channels]``: the step after which a channel is zero; ``NEVER`` until
            it begins.
    """

    def __init__(self, stepping: OptimizerView, num_channels: int, num_steps: int) -> None:
        self.over_at = torch.full((num_channels,), NEVER)
        self._stepping = stepping
        self._num_steps = num_steps
        self._left = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        self._over_at = self.over_at
        self._slices: dict[Tensor, list[_Slices]] = {}
        self._has_started = True
        # Of channels under way, where they started, in the place of what their weights are now.
        self._known = torch.zeros(num_channels, dtype=torch.bool)
        self._starts: Mapping[Tensor, Sequence[Tensor]] = {}

    def follow(self, network: nn.Module, groups: Groups, scales: FreezePlan) -> None:
        """Write these scales from the next step on.

        Args:
            network: not wrapped.
            groups: its channel groups.
            scales: what scales the frozen channels is frozen in it.
        """
        if self._has_started:
            self._known = known = self.over_at < NEVER
            self._starts = {p: [s.start_of(known) for s in own] for p, own in self._items}
        self._has_started = False
        parameters = dict(network.named_parameters())
        channel_at = _channels_of_scales(groups, parameters)
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._slices = {
            p: [_Slices(shard, block, channel_at[names[p]]) for shard in self._stepping.shards(p)]
            for p, block in scales.blocks.items()
        }
        device = next(iter(parameters.values())).device
        self._left, self._over_at = self._left.to(device), self.over_at.to(device)

    def begin(self, channels: Tensor, step: int) -> None:
        """These channels, int64, are over ``num_steps`` after this step."""
        self.over_at[channels] = step + self._num_steps
        self._over_at = self.over_at.to(self._left.device)

    def before_step(self) -> None:
        """What does not come from a state starts from the values as they are now."""
        if self._has_started:
            return
        self._has_started = True
        for parameter, own in self._items:
            for slices, start in zip(own, self._starts.get(parameter, [None] * len(own))):
                slices.start(start, self._known)
        self._starts = {}

    def write(self, step: int, owners: Owners) -> None:
        """What is left after the ``step``-th step."""
        left = self._left[(self._over_at - step).clamp(0, self._num_steps)]
        for _, own in self._items:
            for slices in own:
                if owners is None or slices.shard.owner in owners:
                    slices.write(left)

    def state_dict(
        self, step: int, ranks: Communicator, names: Mapping[Tensor, str]
    ) -> dict[str, Any]:
        """Plain values; where channels started is None if that follows from the weights: before the
        first step of a fade, and when it is over.  Collective if the ranks share the stepping.

        Args:
            step: optimizer steps so far.
            ranks: that step together.
            names: of the parameters.
        """
        under_way = (self.over_at > step) & (self.over_at < step + self._num_steps)
        starts = self._whole_starts(under_way, ranks, names) if bool(under_way.any()) else None
        return {"over_at": self.over_at.clone(), "under_way": under_way, "starts": starts}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Go on from a state; ``follow`` comes next."""
        self.over_at = state["over_at"].to("cpu", copy=True)
        self._known = state["under_way"].to("cpu", copy=True)
        self._starts = {
            (p := parameters[name]): [part_of(start, shard) for shard in self._stepping.shards(p)]
            for name, start in (state["starts"] or {}).items()
        }
        self._has_started = False

    def _whole_starts(
        self, under_way: Tensor, ranks: Communicator, names: Mapping[Tensor, str]
    ) -> dict[str, Tensor]:
        """Of the parameters' shapes, zero but for the channels under way."""
        shared = self._stepping.shared
        whole = {
            p: p.new_zeros(p.shape, dtype=torch.float32 if shared else _precise(p))
            for p in self._slices
        }
        for parameter, own in self._items:
            known = self._starts.get(parameter, [None] * len(own))
            for slices, start in zip(own, known, strict=True):
                part = part_of(whole[parameter], slices.shard)
                slices.put_start(part, under_way, None if self._has_started else start)
        if shared:
            row = ranks.joined(torch.cat([value.flatten() for value in whole.values()]))
            parts = row.split([value.numel() for value in whole.values()])
            whole = {p: part.view(p.shape) for p, part in zip(whole, parts, strict=True)}
        return {names[parameter]: value.detach() for parameter, value in whole.items()}

    @property
    def _items(self) -> Iterator[tuple[Tensor, list[_Slices]]]:
        yield from self._slices.items()


class _Slices:
    """The scales of frozen channels in one parameter: of the part of it that this rank steps.

    Args:
        shard: that part.
        block: of the whole parameter.
        channel_at: int64, for every place along the sliced dimension its channel.
    """

    def __init__(self, shard: Shard, block: Block, channel_at: Tensor) -> None:
        self.shard = shard
        (dim,) = block.frozen
        part = block.part(shard.begin, shard.value.numel())
        ((self._dim, self._places),) = part.frozen.items()
        at = channel_at.to(self._places.device)
        if part is not block:  # a stretch of the flattened parameter
            across = [1] * len(block.shape)
            across[dim] = -1
            at = at.view(across).expand(block.shape).flatten()[shard.begin :]
        self._channels = at[self._places]
        self._start = torch.empty(0)
        self._across = [1] * shard.value.dim()
        self._across[self._dim] = -1

    @torch.no_grad()
    def start(self, start: Tensor | None, known: Tensor) -> None:
        """Start from the values as they are; known channels from where they started before.

        Args:
            start: of the shape of the shard's value.
            known: bool ``[num_channels]``.
        """
        now = self._taken(self.shard.value)
        if start is not None:
            is_known = known.to(now.device)[self._channels].view(self._across)
            now = torch.where(is_known, self._taken(start.to(now.device)), now)
        self._start = now

    @torch.no_grad()
    def write(self, left: Tensor) -> None:
        """Write what is left of each channel, float64 ``[num_channels]`` from 0 to 1."""
        share = left[self._channels].to(self._start.dtype).view(self._across)
        faded = (self._start * share).to(self.shard.value.dtype)
        self.shard.value.index_copy_(self._dim, self._places, faded)

    @torch.no_grad()
    def put_start(self, out: Tensor, channels: Tensor, start: Tensor | None = None) -> None:
        """Write where channels started into a tensor of the shape of the shard's value.

        Args:
            out: is written to at the places of frozen channels, zero where not of ``channels``.
            channels: bool ``[num_channels]``.
            start: instead of where it has started, of the shape of the shard's value.
        """
        where = self._start if start is None else self._taken(start.to(out.device))
        chosen = channels.to(out.device)[self._channels].view(self._across)
        out.index_copy_(self._dim, self._places, (where * chosen).to(out.dtype))

    def start_of(self, channels: Tensor) -> Tensor:
        """The same as a new tensor, zero elsewhere."""
        out = torch.zeros_like(self.shard.value, dtype=_precise(self.shard.value))
        self.put_start(out, channels)
        return out

    def _taken(self, values: Tensor) -> Tensor:
        return values.detach().index_select(self._dim, self._places).to(_precise(self.shard.value))


def _channels_of_scales(
    groups: Groups, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """For every parameter that scales channels, int64 along its sliced dimension, the channel."""
    found: dict[str, Tensor] = {}
    first = 0
    for group in groups:
        channels = torch.arange(first, first + group.num_channels).unsqueeze(1)
        for member in group.silencers:
            for name, dim in member.parameters:
                size = parameters[name].shape[dim]
                at = found.setdefault(name, torch.full((size,), -1))
                at[member.positions] = channels.expand_as(member.positions)
        first += group.num_channels
    return found


def _precise(tensor: Tensor) -> torch.dtype:
    """What fades are reckoned in."""
    return torch.promote_types(tensor.dtype, torch.float32)
