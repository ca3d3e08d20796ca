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
from ..truncation.memory import (
    HELD_MOMENTS,
    TruncationMemory,
    compressed_bytes,
    copies_memory,
    index_bytes,
    packing_memory,
)
from .stage import Stage, freeze_plans
from .target import Target
from .wrapped import ShardsOf, meta_shard

__all__ = ["Memory", "TrainingState", "memory_of_stages", "training_state", "whole"]

_FP32 = 4
_MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}
"""Tensors of optimizer state for each parameter; of SGD with momentum."""


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
    target: Target,
    network: nn.Module,
    ticket: nn.Module,
    groups: Groups,
    mask: Mask,
    batch: int,
    shards_of: ShardsOf,
    packed: Mapping[Stage, TruncationMemory | None],
) -> Mapping[Stage, Memory]:
    """Memory in the stages of a run; see ``Stage``.

    Args:
        target: the network and its settings.
        network: the dense network.
        ticket: the network without the dropped channels.
        groups: the channel groups of the dense network.
        mask: the channels that are kept.
        batch: samples in a rank's pass.
        shards_of: returns the shards of a parameter of the dense network that the rank steps,
            without data.
        packed: memory to send what is not left out in the stages with frozen channels; None if all
            gradients are packed at once.
    """
    config, settings = target.worm.truncation, target.worm.ticket
    sample = torch.empty(batch, *target.sample_shape, device="meta")
    inputs = most_recorded_bytes(
        settings.recalibrate_batches, settings.recalibrate_memory_mb << 20, sample.nbytes
    )
    found: dict[Stage, Memory] = {"dense": Memory(_undivided(network, target), inputs)}
    if config.mode == "hard":
        # Which elements a shard has is only known on the CPU; the shards are on an accelerator.
        held = FreezePlan(network, groups, ~mask.keep, config.scope)
        copies = copies_memory(held, shards_of, config, HELD_MOMENTS[target.optimizer])
        network = copy.deepcopy(network).to("meta")
        averaged = [p for p in network.parameters() if p.requires_grad]
        for stage, sent in freeze_plans(config, network, groups, mask).items():
            indices = index_bytes(sent) + index_bytes(held) * (stage == "faded")
            packing = packed.get(stage) or packing_memory(sent, averaged, config)
            found[stage] = Memory(copies + packing + TruncationMemory(indices=indices), inputs)
    found["ticket"] = Memory(_undivided(ticket, target), 0)
    return found


def _undivided(network: nn.Module, target: Target) -> TruncationMemory:
    """Memory while nothing is frozen."""
    averaged = [p for p in network.parameters() if p.requires_grad]
    shapes = [p.shape for p in averaged]
    size = averaged[0].element_size()
    return TruncationMemory(buffers=compressed_bytes(shapes, size, target.worm.truncation))


@dataclass(frozen=True)
class TrainingState:
    """Bytes that training holds on a rank, without those of buckets and activations.

    Attributes:
        weights: of its part of the weights, or of all.
        gathered: most full weights at a time, where it holds a part.
        gradients: of its part of the gradients, or of all.
        optimizer: of the optimizer's state, and of DeepSpeed's master weights.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer


def training_state(
    target: Target, network: nn.Module, shards_of: ShardsOf, gathered_bytes: int
) -> TrainingState:
    """What training a network holds; see ``docs/deepspeed.md`` for what an engine does at times.

    Args:
        target: the network and its settings.
        network: the network in a stage.
        shards_of: returns the shards of a parameter that the rank steps.
        gathered_bytes: most bytes of full weights at a time, where the rank holds only parts.
    """
    settings, parameters = target.wrapper, list(network.parameters())
    num_all = sum(parameter.numel() for parameter in parameters)
    num_own = sum(shard.value.numel() for p in parameters for shard in shards_of(p))
    stage = settings.zero.stage if settings.kind == "deepspeed" else 0
    is_spread = settings.kind == "fsdp" or stage == 3
    size = settings.zero.weights.itemsize if settings.kind == "deepspeed" else _FP32
    num_moments = _MOMENTS[target.optimizer]
    return TrainingState(
        weights=(num_own if is_spread else num_all) * size,
        gathered=gathered_bytes,
        gradients=(num_own if is_spread or stage == 2 else num_all) * size,
        optimizer=num_own * _FP32 * (num_moments + (stage > 0)),
    )


def whole(parameter: Tensor) -> tuple[Shard, ...]:
    """The only shard of a parameter that the rank steps as a whole."""
    return (meta_shard(parameter, parameter.shape),)
