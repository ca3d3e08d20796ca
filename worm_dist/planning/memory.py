"""Memory of the engine on a rank, in every stage of a run.

Decisions that depend on the device are those for accelerators.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backends.optimizer_view import Shard
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from ..groups.mask import Mask
from ..pruning.recorded_inputs import most_recorded_bytes
from ..truncation.memory import HELD_MOMENTS, TruncationMemory, compressed_bytes, truncation_memory
from .target import Target

__all__ = ["Memory", "memory_of_stages"]


@dataclass(frozen=True)
class Memory:
    """Bytes that the engine holds on a rank.

    Attributes:
        truncation: what truncation holds.
        inputs: recorded inputs, from which BatchNorm statistics are estimated at a draw.
    """

    truncation: TruncationMemory
    inputs: int

    @property
    def total(self) -> int:
        return self.truncation.total + self.inputs


def memory_of_stages(
    target: Target, network: nn.Module, ticket: nn.Module, groups: Groups, mask: Mask, batch: int
) -> Mapping[str, Memory]:
    """Memory in the stages of a run; see ``Stage``.

    Args:
        target: the network and its settings.
        network: the dense network.
        ticket: the network without the dropped channels.
        groups: the channel groups of the dense network.
        mask: the channels that are kept.
        batch: samples in a rank's pass.
    """
    config, settings = target.worm.truncation, target.worm.ticket
    sample = torch.empty(batch, *target.sample_shape, device="meta")
    inputs = most_recorded_bytes(
        settings.recalibrate_batches, settings.recalibrate_memory_mb << 20, sample.nbytes
    )
    found = {"dense": Memory(_undivided(network, target), inputs)}
    if config.mode == "hard":
        network, frozen = copy.deepcopy(network).to("meta"), ~mask.keep
        held = FreezePlan(network, groups, frozen, config.scope)
        plans = {"truncated": held}
        if config.removes:
            plans["faded"] = FreezePlan(network, groups, frozen, config.scope, frozen)
        averaged = [p for p in network.parameters() if p.requires_grad]
        num_moments = HELD_MOMENTS[target.optimizer]
        for stage, sent in plans.items():
            memory = truncation_memory(held, sent, averaged, _whole, config, num_moments)
            found[stage] = Memory(memory, inputs)
    found["ticket"] = Memory(_undivided(ticket, target), 0)
    return found


def _undivided(network: nn.Module, target: Target) -> TruncationMemory:
    """Memory while nothing is frozen."""
    averaged = [p for p in network.parameters() if p.requires_grad]
    shapes = [p.shape for p in averaged]
    size = averaged[0].element_size()
    return TruncationMemory(buffers=compressed_bytes(shapes, size, target.worm.truncation))


def _whole(parameter: Tensor) -> tuple[Shard, ...]:
    return (Shard(parameter, 0, parameter, 0),)
