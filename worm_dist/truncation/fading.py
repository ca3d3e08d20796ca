"""Fading: the way of a channel's scales from where they were to exact zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..cluster.agree import Ranks
from ..cluster.holdings import part_of
from ..cluster.stepping import Owners, Shard, Stepping
from .plan import Block, Plan

__all__ = ["Fading"]


class Fading:
    """The channels that began to fade at one step.

    Args:
        stepping: steps their slices.
        channels: bool ``[num_channels]``.
        plan: what scales them is frozen in it.
        over_at: the step after which they are zero.
        num_steps: how long that takes.
    """

    def __init__(
        self, stepping: Stepping, channels: Tensor, plan: Plan, over_at: int, num_steps: int
    ) -> None:
        self._channels = channels
        self._over_at = over_at
        self._num_steps = num_steps
        self._shared = stepping.shared
        self._has_started = False
        self._slices = {
            parameter: [_Slices(shard, block) for shard in stepping.shards(parameter)]
            for parameter, block in plan.blocks.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return list(self._slices)

    def start(self) -> None:
        """Start from the values as they are, if it has not started yet."""
        if not self._has_started:
            self._has_started = True
            for slices in self._all:
                slices.start(slices.shard.value)

    def start_from(self, values: Mapping[Tensor, Tensor]) -> None:
        """Go on from values, whole, that it has started from before."""
        self._has_started = True
        for parameter, value in values.items():
            for slices in self._slices[parameter]:
                slices.start(part_of(value, slices.shard))

    def write(self, step: int, owners: Owners) -> None:
        """What is left after the ``step``-th step."""
        left = max(0, self._over_at - step) / self._num_steps
        for slices in self._all:
            if owners is None or slices.shard.owner in owners:
                slices.write(left)

    def state(self, step: int, ranks: Ranks, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """Plain values; where it started is None if that follows from the weights: before its first
        step, and when it is over."""
        under_way = self._has_started and step < self._over_at
        return {
            "channels": self._channels.clone(),
            "over_at": self._over_at,
            "num_steps": self._num_steps,
            "start": self._whole_start(ranks, names) if under_way else None,
        }

    def _whole_start(self, ranks: Ranks, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Of the parameters' shapes, zero where nothing fades."""
        whole = {
            p: torch.zeros(
                p.shape,
                dtype=torch.float32 if self._shared else _reckoned(p),
                device=p.device,
            )
            for p in self._slices
        }
        for parameter, pieces in self._slices.items():
            for piece in pieces:
                piece.put_start(part_of(whole[parameter], piece.shard))
        if self._shared:
            row = ranks.joined(torch.cat([value.flatten() for value in whole.values()]))
            parts = row.split([value.numel() for value in whole.values()])
            whole = {p: part.view(p.shape) for p, part in zip(whole, parts, strict=True)}
        return {names[parameter]: value for parameter, value in whole.items()}

    @property
    def _all(self) -> Iterator[_Slices]:
        for slices in self._slices.values():
            yield from slices


class _Slices:
    """The fading slices of one parameter: of the part of it that this rank steps."""

    def __init__(self, shard: Shard, block: Block) -> None:
        self.shard = shard
        self._places = block.part(shard.begin, shard.value.numel()).frozen
        self._start: Mapping[int, Tensor] = {}

    @torch.no_grad()
    def start(self, values: Tensor) -> None:
        """Fade from these, of the shape of the shard's value."""
        here = values.to(self.shard.value.device)
        self._start = {
            dim: here.index_select(dim, at).to(_reckoned(here)) for dim, at in self._places.items()
        }

    @torch.no_grad()
    def write(self, left: float) -> None:
        for dim, at in self._places.items():
            faded = (self._start[dim] * left).to(self.shard.value.dtype)
            self.shard.value.index_copy_(dim, at, faded)

    def put_start(self, out: Tensor) -> None:
        """Write where it started into a tensor of the shape of the shard's value."""
        for dim, at in self._places.items():
            out.index_copy_(dim, at, self._start[dim])


def _reckoned(tensor: Tensor) -> torch.dtype:
    """What fades are reckoned in."""
    return torch.promote_types(tensor.dtype, torch.float32)
