"""Memory: what PowerSGD remembers of a bucket, taken apart by its parameters.

After a restart DDP begins with other buckets than those it had come to, and arranges them anew
after the first pass.  What is remembered goes from one arrangement to the next, parameter by
parameter; where new thin matrices are due, they are drawn as the old buckets would have drawn them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..groups.freeze_plan import Block, FreezePlan
from .packing import Packing, as_it_lies

__all__ = ["Memory", "blocks_under", "thin_sizes"]


@dataclass(frozen=True, eq=False)
class Memory:
    """Of one bucket.

    Attributes:
        parameters: of the bucket, in its order.
        blocks: which part of each of them lived when it was last averaged; None for all.
        left_out: what was left out of the gradients, of the parameters' shapes, zero where they
            were frozen; not there if nothing was.
        thin: for each parameter the thin matrix that the next approximation begins with, in one
            row; empty for those averaged exactly.  None if they have to be drawn.
    """

    parameters: Sequence[Tensor]
    blocks: Sequence[Block | None]
    left_out: Mapping[Tensor, Tensor]
    thin: Mapping[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        parameters: Sequence[Tensor],
        packing: Packing | None,
        left_out: Tensor | None,
        thin: Tensor | None,
        rank: int,
    ) -> Memory:
        """Take apart what torch's hook remembers.

        Args:
            parameters: of the bucket, in its order.
            packing: by which the bucket was packed.
            left_out: ``[live elements]``.
            thin: all thin matrices in one row.
            rank: their number of columns, where the gradients have as many.
        """
        blocks = [None] * len(parameters) if packing is None else packing.blocks
        apart = {} if left_out is None else _unpacked(left_out, parameters, packing)
        matrices = None
        if thin is not None:
            sizes = [
                thin_sizes(_live_shape(p, block), rank)[1]
                for p, block in zip(parameters, blocks, strict=True)
            ]
            rows = (row.clone() for row in thin.split(sizes))
            matrices = dict(zip(parameters, rows, strict=True))
        return cls(parameters, blocks, apart, matrices)

    @classmethod
    def arranged(cls, memories: Sequence[Memory], parameters: Sequence[Tensor]) -> Memory:
        """The same of a bucket that has these parameters."""
        held = {p: memory for memory in memories for p in memory.parameters}
        blocks = {p: b for memory in memories for p, b in zip(memory.parameters, memory.blocks)}
        thin = {p: held[p].thin for p in parameters}
        return cls(
            parameters,
            [blocks[p] for p in parameters],
            {p: held[p].left_out[p] for p in parameters if p in held[p].left_out},
            None
            if any(rows is None for rows in thin.values())
            else {p: rows[p] for p, rows in thin.items() if rows is not None},
        )

    def fits(self, plan: FreezePlan | None) -> bool:
        """Whether the same parts live by this plan: only then do the thin matrices have a sense."""
        now = blocks_under(plan, self.parameters)
        return all(then is block for then, block in zip(self.blocks, now, strict=True))

    def drawn(self, plan: FreezePlan | None, rank: int, seed: int) -> dict[Tensor, Tensor]:
        """Thin matrices as torch's hook would draw them for this bucket, by this plan."""
        matrices = {}
        blocks = blocks_under(plan, self.parameters)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for parameter, block in zip(self.parameters, blocks, strict=True):
                _, size = thin_sizes(_live_shape(parameter, block), rank)
                row = torch.randn(size, dtype=parameter.dtype) if size else torch.empty(0)
                matrices[parameter] = row.to(parameter)
        return matrices

    def num_live(self, plan: FreezePlan | None) -> int:
        """Elements of the bucket that live by this plan."""
        blocks = blocks_under(plan, self.parameters)
        return sum(
            p.numel() if block is None else block.num_live
            for p, block in zip(self.parameters, blocks, strict=True)
        )


def blocks_under(plan: FreezePlan | None, parameters: Sequence[Tensor]) -> list[Block | None]:
    """Which part of each parameter lives by a plan."""
    return [plan.blocks.get(p) if plan is not None else None for p in parameters]


def thin_sizes(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Elements of the two thin matrices that stand for a gradient of this shape; none if torch's
    hook averages it exactly, as it does where they would not halve it."""
    rows = shape[0] if shape else 1
    columns = torch.Size(shape).numel() // max(1, rows)
    thin = min(rows, columns, rank)
    halves = (rows + columns) * thin * 2 < rows * columns
    return (rows * thin, columns * thin) if halves else (0, 0)


def _live_shape(parameter: Tensor, block: Block | None) -> Sequence[int]:
    return parameter.shape if block is None else block.live_shape


def _unpacked(
    elements: Tensor, parameters: Sequence[Tensor], packing: Packing | None
) -> dict[Tensor, Tensor]:
    """Elements of a bucket as tensors of the parameters' shapes."""
    whole = [elements.new_empty(p.shape) for p in parameters]
    if packing is not None:
        packing.unpack(whole, packing.parts_of(elements))
    else:
        rows = elements.split([p.numel() for p in parameters])
        for p, row, place in zip(parameters, rows, whole, strict=True):
            place.copy_(as_it_lies(p, row.view(p.shape)))
    return dict(zip(parameters, whole, strict=True))
