"""Fading: linear decay of removed channels' scales from their start values to exact zero.

Step a of N leaves (N - a) / N of the start value.  A geometric decay is unsafe: the following norm
amplifies a channel again however small its scale is, and a layer may come to depend on its fading
channels alone.  Only exact zero removes a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.full_state import part_of
from ..backends.optimizer_view import OptimizerView, Owners, Shard
from ..distributed.collectives import Communicator
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import Block, FreezePlan
from ..groups.full_shape import full_shape
from ..schema import FiniteTensor, Flags, Integers, Schema
from .slices import RepeatedWrite, Slices, group_slices

__all__ = ["NEVER", "Fade", "FadeSchema"]

NEVER = 2**62
"""A step number that is never reached."""


class FadeSchema(Schema):
    """Schema of ``Fade.state_dict``."""

    over_at: Integers
    under_way: Flags
    starts: dict[str, FiniteTensor] | None

    def vectors(self) -> dict[str, Tensor]:
        """The tensors with one element for each channel, by key."""
        return {"over_at": self.over_at, "under_way": self.under_way}


class Fade:
    """Overwrites the scales of frozen channels after every step: held, fading or zero.

    Its cost does not depend on how many channels fade, or when.

    Args:
        view: the view of the optimizer that steps the scales.
        num_channels: number of the network's channels.
        num_steps: optimizer steps of a fade.

    Attributes:
        over_at: int64 ``[num_channels]``: the step after which a channel is zero; ``NEVER`` until
            its fade begins.
    """

    def __init__(self, view: OptimizerView, num_channels: int, num_steps: int) -> None:
        self.over_at = torch.full((num_channels,), NEVER)
        self._view = view
        self._num_steps = num_steps
        self._remaining = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        self._over_at = self.over_at
        self._changes_until = 0
        self._slices: dict[Tensor, list[_Slices]] = {}
        self._written: list[_WrittenTogether] = []
        self._has_started = True
        # Start values of fades under way, which the current weights no longer show.
        self._known = torch.zeros(num_channels, dtype=torch.bool)
        self._starts: Mapping[Tensor, Sequence[Tensor]] = {}

    def set_scales(self, network: nn.Module, groups: Groups, scales: FreezePlan) -> None:
        """Overwrite these scales from the next step on.

        Args:
            network: the bare network.
            groups: its channel groups.
            scales: the freeze plan of the frozen channels' scales and shifts.
        """
        if self._has_started:
            self._known = known = self.over_at < NEVER
            self._starts = {
                p: [slices.start_of(known) for slices in all_slices]
                for p, all_slices in self._items
            }
        self._has_started = False
        parameters = dict(network.named_parameters())
        channel_at = _channels_of_scales(groups, parameters)
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._slices = {
            p: [_Slices(shard, block, channel_at[names[p]]) for shard in self._view.shards(p)]
            for p, block in scales.blocks.items()
        }
        self._written = []
        device = next(iter(parameters.values())).device
        self._remaining, self._over_at = self._remaining.to(device), self.over_at.to(device)

    def begin(self, channels: Tensor, step: int) -> None:
        """Begin to fade channels after this step.

        Args:
            channels: int64 indices of the channels.
            step: optimizer steps so far.
        """
        self.over_at[channels] = step + self._num_steps
        self._changes_until = step + self._num_steps
        self._over_at = self.over_at.to(self._remaining.device)

    def before_step(self) -> None:
        """Record start values: from a loaded state, else the current weights."""
        if self._has_started:
            return
        self._has_started = True
        for parameter, all_slices in self._items:
            starts = self._starts.get(parameter, [None] * len(all_slices))
            for slices, start in zip(all_slices, starts):
                slices.start(start, self._known)
        self._starts = {}
        by_shard = {s.shard: s for _, all_slices in self._items for s in all_slices}
        groups = group_slices((s.shard, s.block) for s in by_shard.values())
        self._written = [
            _WrittenTogether([by_shard[shard] for shard in shards], slices)
            for shards, slices in groups
        ]

    def write(self, step: int, owners: Owners) -> None:
        """Overwrite the scales in ``owners`` after the ``step``-th step."""
        remaining: Tensor | None = None
        for written in self._written:
            if owners is None or written.owner in owners:
                # Once no channel fades, scales are overwritten with the same values.
                if written.newest_step < self._changes_until:
                    if remaining is None:
                        left = (self._over_at - step).clamp(0, self._num_steps)
                        remaining = self._remaining[left]
                    written.fade(remaining)
                    written.newest_step = step
                written.write()

    def num_nonzero(self, step: int) -> Tensor:
        """int64 scalar: the number of scales that are not zero although their fade is over."""
        is_over = self._over_at <= step
        total = torch.zeros((), dtype=torch.int64, device=is_over.device)
        for written in self._written:
            total += written.num_nonzero(is_over)
        return total

    def state_dict(
        self, step: int, comm: Communicator, names: Mapping[Tensor, str]
    ) -> dict[str, Any]:
        """The state in plain values; ``"starts"`` is None if no fade is between its first and its
        last step.  Collective if the optimizer is sharded.

        Args:
            step: optimizer steps so far.
            comm: the communicator of the ranks that share the optimizer.
            names: the parameters' names.
        """
        under_way = (self.over_at > step) & (self.over_at < step + self._num_steps)
        starts = self._full_starts(under_way, comm, names) if bool(under_way.any()) else None
        return {"over_at": self.over_at.clone(), "under_way": under_way, "starts": starts}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Restore a state; ``set_scales`` must follow."""
        self.over_at = state["over_at"].to("cpu", copy=True)
        self._changes_until = int((self.over_at * (self.over_at < NEVER)).max())
        self._known = state["under_way"].to("cpu", copy=True)
        self._starts = {
            (p := parameters[name]): [part_of(start, shard) for shard in self._view.shards(p)]
            for name, start in (state["starts"] or {}).items()
        }
        self._has_started = False

    @staticmethod
    def pruned_state(
        state: Mapping[str, Any], kept: Tensor, prune: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Any]:
        """A state of ``state_dict`` after channels have been removed; see ``Truncation``."""
        starts = state["starts"]
        return {
            "over_at": state["over_at"][kept],
            "under_way": state["under_way"][kept],
            "starts": starts and {name: prune(name, start) for name, start in starts.items()},
        }

    def _full_starts(
        self, under_way: Tensor, comm: Communicator, names: Mapping[Tensor, str]
    ) -> dict[str, Tensor]:
        """Start values by parameter name, of the parameters' shapes, zero except in channels whose
        fade is under way."""
        shared = self._view.shared
        full = {
            p: torch.zeros(
                full_shape(p), dtype=torch.float32 if shared else _compute_dtype(p), device=p.device
            )
            for p in self._slices
        }
        for parameter, all_slices in self._items:
            known = self._starts.get(parameter, [None] * len(all_slices))
            for slices, start in zip(all_slices, known, strict=True):
                part = part_of(full[parameter], slices.shard)
                slices.put_start(part, under_way, None if self._has_started else start)
        if shared:
            flat = comm.all_reduce_disjoint(torch.cat([value.flatten() for value in full.values()]))
            parts = flat.split([value.numel() for value in full.values()])
            full = {p: part.view(full_shape(p)) for p, part in zip(full, parts, strict=True)}
        return {names[parameter]: value.detach() for parameter, value in full.items()}

    @property
    def _items(self) -> Iterator[tuple[Tensor, list[_Slices]]]:
        yield from self._slices.items()


class _Slices:
    """The scales of frozen channels in one shard.

    Args:
        shard: the shard of a parameter that this rank steps.
        block: the live and frozen slices of the full parameter.
        channel_at: int64, the channel of every index along the sliced dimension.
    """

    def __init__(self, shard: Shard, block: Block, channel_at: Tensor) -> None:
        self.shard, self.block = shard, block
        (dim,) = block.frozen
        part = block.of_shard(shard.begin, shard.value.shape)
        ((self._dim, self._indices),) = part.frozen.items()
        channel_at = channel_at.to(self._indices.device)
        if part is not block and shard.value.dim() > 1:  # whole rows
            if dim == 0:
                first = shard.begin // block.shape[1:].numel()
                channel_at = channel_at[first : first + len(shard.value)]
        elif part is not block:  # a part of the flattened parameter
            shape = [1] * len(block.shape)
            shape[dim] = -1
            channel_at = channel_at.view(shape).expand(block.shape).flatten()[shard.begin :]
        self._channels = channel_at[self._indices]
        self._start = torch.empty(0)
        self._broadcast_shape = [1] * shard.value.dim()
        self._broadcast_shape[self._dim] = -1

    @torch.no_grad()
    def start(self, start: Tensor | None, known: Tensor) -> None:
        """Record the current values as start values, except where they are known.

        Args:
            start: known start values, of the shape of the shard's value.
            known: bool ``[num_channels]``: channels whose start value is taken from ``start``.
        """
        current = self._selected(self.shard.value)
        if start is not None:
            is_known = known.to(current.device)[self._channels].view(self._broadcast_shape)
            current = torch.where(is_known, self._selected(start.to(current.device)), current)
        self._start = current

    @property
    def starts_and_channels(self) -> tuple[Tensor, Tensor]:
        """Of every element: its start value, and int64 its channel; both of the same shape."""
        return self._start, self._channels.view(self._broadcast_shape).expand_as(self._start)

    @torch.no_grad()
    def put_start(self, out: Tensor, channels: Tensor, start: Tensor | None = None) -> None:
        """Write start values into ``out``, at the indices of frozen channels.

        Args:
            out: the tensor to write to, of the shape of the shard's value.
            channels: bool ``[num_channels]``: zero is written for the other frozen channels.
            start: start values to use instead of the recorded ones, of the same shape.
        """
        values = self._start if start is None else self._selected(start.to(out.device))
        chosen = channels.to(out.device)[self._channels].view(self._broadcast_shape)
        out.index_copy_(self._dim, self._indices, (values * chosen).to(out.dtype))

    def start_of(self, channels: Tensor) -> Tensor:
        """Start values of these channels in a new tensor, zero elsewhere; see ``put_start``."""
        out = torch.zeros_like(self.shard.value, dtype=_compute_dtype(self.shard.value))
        self.put_start(out, channels)
        return out

    def _selected(self, values: Tensor) -> Tensor:
        selected = values.detach().index_select(self._dim, self._indices)
        return selected.to(_compute_dtype(self.shard.value))


class _WrittenTogether:
    """The scales of frozen channels in shards that are written together.

    Args:
        members: the scales of each shard, with their start values.
        slices: the slices of the same shards.

    Attributes:
        owner: the tensor of the first shard that the optimizer steps.
        newest_step: the step for which ``fade`` has been called last; -1 before.
    """

    def __init__(self, members: Sequence[_Slices], slices: Slices) -> None:
        self.owner = members[0].shard.owner
        self.newest_step = -1
        self._values = [member.shard.value for member in members]
        self._slices = slices
        pairs = [member.starts_and_channels for member in members]
        self._starts = torch.cat([starts.flatten() for starts, _ in pairs])
        self._channels = torch.cat([channels.flatten() for _, channels in pairs])
        self._faded = torch.empty_like(self._starts, dtype=self._values[0].dtype)
        shape = pairs[0][0].shape if len(pairs) == 1 else self._faded.shape
        self._copies = (self._faded.view(shape),)
        self._write = RepeatedWrite(slices)

    @torch.no_grad()
    def fade(self, remaining: Tensor) -> None:
        """Compute the scales.

        Args:
            remaining: float64 ``[num_channels]``, the remaining share of each start value, 0 to 1.
        """
        share = remaining[self._channels].to(self._starts.dtype)
        torch.mul(self._starts, share, out=self._faded)

    @torch.no_grad()
    def write(self) -> None:
        """Overwrite the scales with those computed last."""
        self._write([(self._values, self._copies)])

    @torch.no_grad()
    def num_nonzero(self, is_over: Tensor) -> Tensor:
        """int64 scalar: the number of scales of these channels that are not zero now.

        Args:
            is_over: bool ``[num_channels]``.
        """
        copies = self._slices.take(self._values)
        assert copies is not None
        return ((copies[0].reshape(-1) != 0) & is_over[self._channels]).sum()


def _channels_of_scales(
    groups: Groups, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """By name of every scale or shift, int64: the channel of each index along its sliced dimension,
    -1 where there is none."""
    found: dict[str, Tensor] = {}
    first = 0
    for group in groups:
        channels = torch.arange(first, first + group.num_channels).unsqueeze(1)
        for member in group.zeroing_members:
            for name, dim in member.parameters:
                size = full_shape(parameters[name])[dim]
                channel_at = found.setdefault(name, torch.full((size,), -1))
                channel_at[member.positions] = channels.expand_as(member.positions)
        first += group.num_channels
    return found


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which fades are computed: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
