"""Packing: copy the live elements of a bucket's gradients to one contiguous buffer, and back.

One copy each way, row by row; no loop over channels and no host-device synchronisation.  The buffer
is allocated once per generation: allocating it in every step costs several times the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..groups.freeze_plan import Block

__all__ = ["Packing", "with_parameter_strides"]


class Packing:
    """The layout of one bucket's live elements in one generation.

    Args:
        blocks: the live and frozen slices of each gradient, in the bucket's order; None if all of
            a gradient is live.
        shapes: the gradients' shapes.
        dtype, device: the gradients' dtype and device.

    Attributes:
        blocks: the argument.
        num_live: number of live elements.
    """

    def __init__(
        self,
        blocks: Sequence[Block | None],
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self._shapes = [
            torch.Size(block.live_shape) if block is not None else shape
            for block, shape in zip(blocks, shapes, strict=True)
        ]
        self.num_live = sum(shape.numel() for shape in self._shapes)
        self._dtype = dtype
        self._device = device

    @cached_property
    def buffer(self) -> Tensor:
        """The buffer to send, ``[live elements]``, allocated at first use."""
        return torch.empty(self.num_live, dtype=self._dtype, device=self._device)

    @cached_property
    def parts(self) -> list[Tensor]:
        """The live part of every gradient, as views of the buffer."""
        return self.parts_of(self.buffer)

    def parts_of(self, buffer: Tensor) -> list[Tensor]:
        """The same views of another buffer ``[live elements]``."""
        sizes = [shape.numel() for shape in self._shapes]
        parts = zip(buffer.split(sizes), self._shapes, strict=True)
        return [part.view(shape) for part, shape in parts]

    def pack(self, gradients: Sequence[Tensor], parts: Sequence[Tensor] | None = None) -> None:
        """Copy the live part of every gradient into the buffer, or into ``parts`` of another."""
        parts = self.parts if parts is None else parts
        for gradient, block, part in zip(gradients, self.blocks, parts, strict=True):
            if block is None:
                part.copy_(gradient)
            else:
                _take(gradient, block, part)

    def unpack(self, gradients: Sequence[Tensor], parts: Sequence[Tensor] | None = None) -> None:
        """Write the buffer, or ``parts`` of another, to the live parts of the gradients, and exact
        zeros to their frozen parts."""
        parts = self.parts if parts is None else parts
        for gradient, block, part in zip(gradients, self.blocks, parts, strict=True):
            if block is None:
                gradient.copy_(part)
            else:
                _put(gradient, block, part)
                for dim, frozen in block.frozen.items():
                    gradient.index_fill_(dim, frozen, 0)

    def update(self, values: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Write ``parts`` of a buffer to the live parts of the values; frozen parts stay
        unchanged."""
        for value, block, part in zip(values, self.blocks, parts, strict=True):
            if block is None:
                value.copy_(part)
            else:
                _put(value, block, part)


def with_parameter_strides(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A bucket's gradient with the strides in which DDP stored it: those of its dense parameter.
    ``GradBucket.gradients`` views it as contiguous, which is wrong in channels_last."""
    if parameter.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())


def _take(gradient: Tensor, block: Block, out: Tensor) -> None:
    if out.numel() == 0:
        return
    if len(block.live) == 2:
        # Rows first: they are contiguous, and columns are then selected from fewer of them.
        gradient = gradient.index_select(0, block.live[0])
        torch.index_select(gradient, 1, block.live[1], out=out)
    else:
        ((dim, live),) = block.live.items()
        torch.index_select(gradient, dim, live, out=out)


def _put(gradient: Tensor, block: Block, part: Tensor) -> None:
    if len(block.live) == 2:
        rows = gradient.index_select(0, block.live[0])
        part = rows.index_copy_(1, block.live[1], part)
        dim = 0
    else:
        (dim,) = block.live
    gradient.index_copy_(dim, block.live[dim], part)
