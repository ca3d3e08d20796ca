"""Packing: copy the live elements of a bucket's gradients to one contiguous buffer, and back.

No loop over channels, and no host-device synchronisation.  Most gradients of a network are small:
neighbours among them are gathered by one index over the bucket, and scattered by one.  Large ones
are copied by rows and columns instead, because an index of eight bytes for each of their elements
would take more memory than they do.  The order of the elements stays that of the bucket, so a ring
of ranks adds them as it would without truncation.

The buffer is allocated once per generation: allocating it in every step costs several times the
copy.  After the first pass nothing is allocated: DDP unpacks in callbacks, each on a stream from a
pool, and the caching allocator would keep the memory of a temporary tensor for that stream alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ..groups.freeze_plan import Block
from .checksums import NUM_CHECKSUMS

__all__ = ["Packing", "with_parameter_strides"]

_LARGE = 2**20
"""Elements of a gradient that is copied alone."""
_ROWS_AT_ONCE = 2**21
"""Elements of the rows from which columns are selected at once: the size of a scratch buffer that
is kept for each bucket that needs one.  With fewer, launches would take longer than copies."""
_SHORT_ROW = 64
"""Elements of a row that a CPU copies no faster than as many single elements."""


class Packing:
    """The layout of one bucket's live elements in one generation.

    Args:
        blocks: the live and frozen slices of each gradient, in the bucket's order; None if all of
            a gradient is live.
        gradients: views of the bucket, one for each block.
        bucket: the bucket, one-dimensional and contiguous.

    Attributes:
        blocks: the argument.
        num_live: number of live elements.
    """

    def __init__(
        self, blocks: Sequence[Block | None], gradients: Sequence[Tensor], bucket: Tensor
    ) -> None:
        assert bucket.dim() == 1 and bucket.is_contiguous()
        self.blocks = blocks
        self._layouts = [
            (g.shape, g.stride(), g.storage_offset() - bucket.storage_offset()) for g in gradients
        ]
        self._live_shapes = [
            torch.Size(block.live_shape) if block is not None else gradient.shape
            for block, gradient in zip(blocks, gradients, strict=True)
        ]
        self._sizes = [shape.numel() for shape in self._live_shapes]
        *self._begins, self.num_live = accumulate(self._sizes, initial=0)
        self._dtype, self._device = bucket.dtype, bucket.device
        self._runs: list[list[int]] = []
        self._alone: list[int] = []
        for number, (gradient, block) in enumerate(zip(gradients, blocks, strict=True)):
            if not _gathers_by_index(gradient, block):
                self._alone.append(number)
            elif self._runs and self._runs[-1][-1] == number - 1:
                self._runs[-1].append(number)
            else:
                self._runs.append([number])

    @property
    def live_shapes(self) -> Sequence[torch.Size]:
        """The shape of the live part of every gradient."""
        return self._live_shapes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that are kept after the first pass."""
        return (self.num_live + NUM_CHECKSUMS + self._scratch_size) * self._dtype.itemsize

    @property
    def num_indices(self) -> int:
        """Number of indices that are kept, each of eight bytes, besides those of the blocks."""
        return sum(self._sizes[number] for run in self._runs for number in run)

    @cached_property
    def wire(self) -> Tensor:
        """The buffer with room for checksums behind it, allocated at first use."""
        size = self.num_live + NUM_CHECKSUMS
        return torch.empty(size, dtype=self._dtype, device=self._device)

    @cached_property
    def buffer(self) -> Tensor:
        """The buffer of the live elements, ``[live elements]``."""
        return self.wire[: self.num_live]

    @cached_property
    def parts(self) -> list[Tensor]:
        """The live part of every gradient, as views of the buffer."""
        return self.parts_of(self.buffer)

    def parts_of(self, buffer: Tensor) -> list[Tensor]:
        """The same views of another buffer ``[live elements]``."""
        parts = zip(buffer.split(self._sizes), self._live_shapes, strict=True)
        return [part.view(shape) for part, shape in parts]

    def gradients_of(self, bucket: Tensor) -> list[Tensor]:
        """The gradients as views of a tensor of the bucket's size."""
        begin = bucket.storage_offset()
        return [
            bucket.as_strided(shape, stride, begin + offset)
            for shape, stride, offset in self._layouts
        ]

    def pack(self, bucket: Tensor, buffer: Tensor | None = None) -> None:
        """Copy the live elements of a bucket into the buffer, or into another one."""
        buffer = self.buffer if buffer is None else buffer
        for index, begin in self._indices:
            torch.index_select(bucket, 0, index, out=buffer[begin : begin + index.numel()])
        for gradient, block, part in self._written_alone(bucket, buffer):
            if block is None:
                part.copy_(gradient)
            else:
                self._take(gradient, block, part)

    def unpack(self, bucket: Tensor, buffer: Tensor | None = None) -> None:
        """Write the buffer, or another one, to the live elements of a bucket, and exact zeros to
        its frozen ones."""
        # One pass over contiguous memory is faster than a fill of every frozen slice.
        bucket.zero_()
        self.update(bucket, buffer)

    def update(self, bucket: Tensor, buffer: Tensor | None = None) -> None:
        """Write the buffer, or another one, to the live elements of a bucket; frozen ones stay
        unchanged."""
        buffer = self.buffer if buffer is None else buffer
        for index, begin in self._indices:
            bucket.index_copy_(0, index, buffer[begin : begin + index.numel()])
        for gradient, block, part in self._written_alone(bucket, buffer):
            if block is None:
                gradient.copy_(part)
            else:
                self._put(gradient, block, part)

    @cached_property
    def _indices(self) -> list[tuple[Tensor, int]]:
        """For each run of neighbours that are gathered by one index: int64, where in the bucket
        their live elements are, and where in the buffer they begin."""
        return [(self._index(run), self._begins[run[0]]) for run in self._runs]

    def _index(self, run: Sequence[int]) -> Tensor:
        indices = []
        for number in run:
            block, (shape, stride, offset) = self.blocks[number], self._layouts[number]
            if block is None:
                size = shape.numel()
                elements = torch.arange(size, device=self._device).as_strided(shape, stride)
            else:
                elements = block.live_elements(stride)
            indices.append(elements.flatten() + offset)
        return torch.cat(indices)

    @cached_property
    def _scratch(self) -> Tensor:
        """Rows of a gradient, for the largest chunk of rows of any."""
        return torch.empty(self._scratch_size, dtype=self._dtype, device=self._device)

    @property
    def _scratch_size(self) -> int:
        blocks = (self.blocks[number] for number in self._alone)
        sizes = [
            min(_rows_at_once(block.shape), block.live[0].numel()) * block.shape[1:].numel()
            for block in blocks
            if block is not None and len(block.live) == 2 and block.num_live
        ]
        return max(sizes, default=0)

    def _rows(self, block: Block, part: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of the live rows: their indices, the part's rows, and scratch for full ones."""
        size = _rows_at_once(block.shape)
        for rows, part_rows in zip(block.live[0].split(size), part.split(size), strict=True):
            shape = (rows.numel(), *block.shape[1:])
            yield rows, part_rows, self._scratch[: prod(shape)].view(shape)

    def _take(self, gradient: Tensor, block: Block, out: Tensor) -> None:
        if out.numel() == 0:
            return
        if len(block.live) == 2:
            # Rows first: they are contiguous, and columns are then selected from fewer of them.
            for rows, out_rows, scratch in self._rows(block, out):
                torch.index_select(gradient, 0, rows, out=scratch)
                torch.index_select(scratch, 1, block.live[1], out=out_rows)
        else:
            ((dim, live),) = block.live.items()
            torch.index_select(gradient, dim, live, out=out)

    def _put(self, gradient: Tensor, block: Block, part: Tensor) -> None:
        if part.numel() == 0:
            return
        if len(block.live) == 2:
            for rows, part_rows, scratch in self._rows(block, part):
                torch.index_select(gradient, 0, rows, out=scratch)
                gradient.index_copy_(0, rows, scratch.index_copy_(1, block.live[1], part_rows))
        else:
            ((dim, live),) = block.live.items()
            gradient.index_copy_(dim, live, part)

    def _written_alone(
        self, bucket: Tensor, buffer: Tensor
    ) -> Iterator[tuple[Tensor, Block | None, Tensor]]:
        origin = bucket.storage_offset()
        for number in self._alone:
            shape, stride, offset = self._layouts[number]
            gradient = bucket.as_strided(shape, stride, origin + offset)
            begin, live_shape = self._begins[number], self._live_shapes[number]
            part = buffer[begin : begin + live_shape.numel()].view(live_shape)
            yield gradient, self.blocks[number], part


def _rows_at_once(shape: torch.Size) -> int:
    return max(1, _ROWS_AT_ONCE // shape[1:].numel())


def _gathers_by_index(gradient: Tensor, block: Block | None) -> bool:
    """Whether a gradient is copied element by element, by an index that its neighbours share,
    rather than alone, by rows and columns.

    On an accelerator the number of operations counts.  A CPU copies a long row at once several
    times faster than its elements; blocks of rows and columns take the same time in both ways.
    """
    if gradient.numel() >= _LARGE:
        return False
    has_long_rows = gradient.shape[1:].numel() >= _SHORT_ROW
    is_of_rows = block is None or block.live.keys() == {0}
    return gradient.device.type != "cpu" or not (is_of_rows and has_long_rows)


def with_parameter_strides(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A bucket's gradient with the strides in which DDP stored it: those of its dense parameter.
    ``GradBucket.gradients`` views it as contiguous, which is wrong in channels_last."""
    if parameter.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())
