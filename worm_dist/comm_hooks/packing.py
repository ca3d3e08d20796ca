"""Packing: a bucket's gradients to one contiguous buffer of their live elements, and back.

One copy each way, by whole rows; no loop over channels and no host-device synchronisation.  The
buffer is made once for a generation: allocating it anew each step costs several times the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..groups.freeze_plan import Block

__all__ = ["Packing", "as_it_lies"]


class Packing:
    """How one bucket is packed for one generation.

    Args:
        blocks: which part of each of the bucket's gradients lives, in its order; None for all.
        shapes: of the gradients.
        dtype, device: of the gradients.

    Attributes:
        blocks: as given.
        num_live: elements that live.
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
        """``[live elements]``; what is sent.  Made when it is first asked for."""
        return torch.empty(self.num_live, dtype=self._dtype, device=self._device)

    @cached_property
    def parts(self) -> list[Tensor]:
        """The live part of every gradient, views of the buffer."""
        return self.parts_of(self.buffer)

    def parts_of(self, buffer: Tensor) -> list[Tensor]:
        """The same views of another buffer ``[live elements]``."""
        sizes = [shape.numel() for shape in self._shapes]
        parts = zip(buffer.split(sizes), self._shapes, strict=True)
        return [part.view(shape) for part, shape in parts]

    def pack(self, gradients: Sequence[Tensor], parts: Sequence[Tensor] | None = None) -> None:
        """Copy the live part of every gradient into the buffer, or into these parts of another."""
        parts = self.parts if parts is None else parts
        for gradient, block, part in zip(gradients, self.blocks, parts, strict=True):
            if block is None:
                part.copy_(gradient)
            else:
                _take(gradient, block, part)

    def unpack(self, gradients: Sequence[Tensor], parts: Sequence[Tensor] | None = None) -> None:
        """Write the buffer, or these parts of another, back to the live parts of the gradients, and
        exact zeros to the frozen parts."""
        parts = self.parts if parts is None else parts
        for gradient, block, part in zip(gradients, self.blocks, parts, strict=True):
            if block is None:
                gradient.copy_(part)
            else:
                _put(gradient, block, part)
                for dim, frozen in block.frozen.items():
                    gradient.index_fill_(dim, frozen, 0)

    def update(self, values: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Write these parts of another buffer to the live parts of the values, and leave the frozen
        parts as they are."""
        for value, block, part in zip(values, self.blocks, parts, strict=True):
            if block is None:
                value.copy_(part)
            else:
                _put(value, block, part)


def as_it_lies(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A bucket's gradient with the strides that DDP gave it, those of a dense parameter; what the
    bucket hands out is always in rows.  In channels_last, its columns are not the parameter's."""
    if parameter.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())


def _take(gradient: Tensor, block: Block, out: Tensor) -> None:
    if out.numel() == 0:
        return
    if len(block.live) == 2:
        # Rows first: they are contiguous, and the columns are then taken from fewer of them.
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
