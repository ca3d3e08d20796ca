"""Packing: a bucket's gradients to one contiguous buffer of their live elements, and back.

One copy each way, by whole rows; no loop over channels and no host-device synchronisation.  The
buffer is made once for a generation: allocating it anew each step costs several times the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Block, Plan

__all__ = ["Packing"]


class Packing:
    """How one bucket is packed for one generation.

    Args:
        parameters: the bucket's parameters, in its order.
        plan: which part of them lives.
        dtype, device: of the gradients.

    Attributes:
        buffer: ``[live elements]``; what the all-reduce sends.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        plan: Plan,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._blocks = [plan.blocks.get(parameter) for parameter in parameters]
        shapes = [
            block.live_shape if block else tuple(parameter.shape)
            for block, parameter in zip(self._blocks, parameters)
        ]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.buffer = torch.empty(sum(sizes), dtype=dtype, device=device)
        self._parts = [
            part.view(shape) for part, shape in zip(self.buffer.split(sizes), shapes, strict=True)
        ]

    def pack(self, gradients: Sequence[Tensor]) -> None:
        """Copy the live part of every gradient into the buffer."""
        for gradient, block, part in zip(gradients, self._blocks, self._parts, strict=True):
            if block is None:
                part.copy_(gradient)
            else:
                _take(gradient, block, part)

    def unpack(self, gradients: Sequence[Tensor]) -> None:
        """Write the buffer back to the live parts, and exact zeros to the frozen parts."""
        for gradient, block, part in zip(gradients, self._blocks, self._parts, strict=True):
            if block is None:
                gradient.copy_(part)
            else:
                _put(gradient, block, part)


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
        rows = part.new_zeros(part.shape[0], *block.shape[1:])
        part = rows.index_copy_(1, block.live[1], part)
        dim = 0
    else:
        (dim,) = block.live
    gradient.index_copy_(dim, block.live[dim], part)
    gradient.index_fill_(dim, block.frozen[dim], 0)
