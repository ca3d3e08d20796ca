"""Wrapped: what a forecast asks of a network in a wrapper, for a number of ranks that need not be
there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..backends.optimizer_view import Shard
from ..groups.freeze_plan import Block
from ..truncation.memory import TruncationMemory
from .module_order import Event
from .step_time import Collective

__all__ = ["LeftOut", "ShardsOf", "Wrapped", "meta_shard"]

ShardsOf: TypeAlias = Callable[[Tensor], Sequence[Shard]]


@dataclass(frozen=True)
class LeftOut:
    """What a step leaves out in a stage of a run; each is the live part by parameter.

    Attributes:
        network: the network as it is in this stage.
        gradients: slices whose gradients are not reduced.
        unchanged: slices of weights that a step does not change.
        unread: slices of weights that have no effect, because their channel is zero.
    """

    network: nn.Module
    gradients: Mapping[Tensor, Block] = field(default_factory=dict)
    unchanged: Mapping[Tensor, Block] = field(default_factory=dict)
    unread: Mapping[Tensor, Block] = field(default_factory=dict)


class Wrapped(Protocol):
    """A network that ranks train together."""

    def collectives(self, left_out: LeftOut, order: Sequence[Event]) -> list[Collective]:
        """The collectives of a step in the order in which they start.

        Args:
            left_out: the network in a stage, and what is left out.
            order: the calls of its modules.
        """

    def shards_of(self, network: nn.Module) -> ShardsOf:
        """A function that returns the shards of a parameter that rank zero steps, without data."""

    def packing(self, left_out: LeftOut) -> TruncationMemory | None:
        """The engine's memory to send what is not left out; None if it is that of gradients that
        are packed all at once.

        Args:
            left_out: the network in a stage, and what is left out.
        """

    def gathered_bytes(self, network: nn.Module, order: Sequence[Event]) -> int:
        """Most bytes of full weights that a rank has at a time, where it holds only parts.

        Args:
            network: the network in a stage.
            order: the calls of its modules.
        """


def meta_shard(parameter: Tensor, shape: torch.Size, begin: int = 0) -> Shard:
    """A shard of a parameter without data; see ``Shard``."""
    value = torch.empty(shape, dtype=parameter.dtype, device="meta")
    return Shard(value, begin, value, 0)
