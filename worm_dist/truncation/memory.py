"""Memory: what truncation will hold on a rank, computed from shapes before anything is allocated.

The decisions are those of the code that allocates, so the figures are exact to the byte, except
that gradients are counted as if they were all in one bucket of each dtype: a bucket without frozen
slices is not packed, and holds less; one more bucket that is packed holds two elements more, for
checksums.  Not counted are a few numbers for each channel, such as the start values of fades, and
temporary tensors of bounded size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends.optimizer_view import Shard
from ..comm_hooks.packing import Packing
from ..comm_hooks.powersgd_state import pq_sizes
from ..config import TruncationConfig
from ..groups.freeze_plan import FreezePlan
from ..groups.full_shape import shaped_like
from .slices import group_slices

__all__ = [
    "HELD_MOMENTS",
    "TruncationMemory",
    "compressed_bytes",
    "copies_memory",
    "index_bytes",
    "num_held_moments",
    "packing_memory",
    "truncation_memory",
]

HELD_MOMENTS = {
    "sgd": 0,
    **dict.fromkeys(("adagrad", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop"), 1),
    "adadelta": 2,
}
"""Tensors of optimizer state for each parameter that are held, by the name of the optimizer: all
those of the parameter's shape, except first moments."""

_INT64 = 8
_WIRE_BYTES = {"bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class TruncationMemory:
    """Bytes that truncation holds on a rank while channels are frozen.

    Attributes:
        weights: copies of frozen weights, to write back after each optimizer step.
        moments: copies of their optimizer state.
        buffers: packed gradients; with compression also what is sent of them, or PowerSGD's error
            feedback and factors.
        indices: where live and frozen elements are.
    """

    weights: int = 0
    moments: int = 0
    buffers: int = 0
    indices: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.moments + self.buffers + self.indices

    def __add__(self, other: TruncationMemory) -> TruncationMemory:
        return TruncationMemory(
            self.weights + other.weights,
            self.moments + other.moments,
            self.buffers + other.buffers,
            self.indices + other.indices,
        )


def truncation_memory(
    held: FreezePlan,
    sent: FreezePlan,
    averaged: Collection[Tensor],
    shards_of: Callable[[Tensor], Sequence[Shard]],
    config: TruncationConfig,
    num_moments: int,
) -> TruncationMemory:
    """What hard truncation holds; gathering weights under ZeRO is not included.

    Args:
        held: the slices whose weights do not change.
        sent: the slices whose gradients are left out; ``held`` itself if they are the same.
        averaged: the parameters that are averaged over the ranks; empty on a single process.
        shards_of: returns the shards of a parameter that the rank steps.
        config: the settings of truncation.
        num_moments: tensors of optimizer state for each parameter that are held: all those of the
            parameter's shape, except first moments.
    """
    indices = sum(index_bytes(plan) for plan in {held, sent})
    copies = copies_memory(held, shards_of, config, num_moments)
    packing = packing_memory(sent, averaged, config)
    return copies + packing + TruncationMemory(indices=indices)


def copies_memory(
    held: FreezePlan,
    shards_of: Callable[[Tensor], Sequence[Shard]],
    config: TruncationConfig,
    num_moments: int,
) -> TruncationMemory:
    """What copies of frozen weights and their optimizer state take; see ``truncation_memory``."""
    weights = moments = indices = 0
    if config.frozen_weights != "free":
        items = [(shard, block) for p, block in held.blocks.items() for shard in shards_of(p)]
        for shards, slices in group_slices(items):
            copied = slices.num_copied * shards[0].value.element_size()
            weights += copied
            moments += copied * num_moments
            indices += slices.num_indices * _INT64
    return TruncationMemory(weights, moments, 0, indices)


def packing_memory(
    sent: FreezePlan, averaged: Collection[Tensor], config: TruncationConfig
) -> TruncationMemory:
    """What packed gradients take; see ``truncation_memory``."""
    buffers = indices = 0
    for packing, size in _packings(sent, averaged):
        buffers += packing.buffer_bytes + compressed_bytes(packing.live_shapes, size, config)
        indices += packing.num_indices * _INT64
    return TruncationMemory(0, 0, buffers, indices)


def num_held_moments(optimizer: Optimizer) -> int:
    """Tensors of optimizer state for each parameter that are held; 1 for an unknown optimizer."""
    known = HELD_MOMENTS.get(type(optimizer).__name__.lower(), 1)
    return known + any(group.get("amsgrad", False) for group in optimizer.param_groups)


def index_bytes(plan: FreezePlan) -> int:
    """Bytes of the indices of live and frozen slices."""
    return sum(
        (live.numel() + block.frozen[dim].numel()) * _INT64
        for block in plan.blocks.values()
        for dim, live in block.live.items()
    )


def _packings(plan: FreezePlan, averaged: Iterable[Tensor]) -> list[tuple[Packing, int]]:
    """The packing of all gradients of each dtype, and the bytes of an element."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for parameter in averaged:
        alike[parameter.dtype, parameter.device].append(parameter)
    found: list[tuple[Packing, int]] = []
    for parameters in alike.values():
        if not plan.blocks.keys().isdisjoint(parameters):
            blocks = [plan.blocks.get(parameter) for parameter in parameters]
            # Gradients have the parameters' shapes and strides.
            gradients = [shaped_like(parameter) for parameter in parameters]
            bucket = gradients[0].new_empty(0)
            found.append((Packing(blocks, gradients, bucket), bucket.element_size()))
    return found


def compressed_bytes(
    shapes: Sequence[torch.Size], element_size: int, config: TruncationConfig
) -> int:
    """What compression keeps besides packed gradients: those in the dtype in which they are sent,
    or PowerSGD's error feedback and factors.

    Args:
        shapes: shapes of the live parts of all gradients.
        element_size: bytes of an element of a gradient.
        config: the settings of truncation.
    """
    num_live = sum(shape.numel() for shape in shapes)
    if config.compression == "powersgd":
        factors = sum(sum(pq_sizes(shape, config.compression_rank)) for shape in shapes)
        return (num_live + factors) * element_size
    sent_size = _WIRE_BYTES.get(config.compression, element_size)
    return num_live * sent_size if sent_size < element_size else 0
