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
from typing import TypeAlias

import torch
from torch import Tensor

from ..groups.freeze_plan import Block
from .checksums import NUM_CHECKSUMS
from .wide_rows import row_writer, write_rows

__all__ = ["LARGE", "Packing", "with_parameter_strides"]

LARGE = 2**20
"""Elements of a gradient that is copied alone."""
_ROWS_AT_ONCE = 2**21
"""Elements of the rows from which columns are selected at once: the size of a scratch buffer that
is kept for each bucket that needs one.  With fewer, launches would take longer than copies."""
_SMALL_ON_CPU = 2**15
"""Elements of a gradient that a CPU copies by index sooner than it starts another operation."""
_TOO_LARGE_TO_WRITE_TWICE = 2**18
"""Elements of a gradient of which a CPU sets only the frozen rows to zero."""
_SHORT_ROW = 64
"""Elements of a row that a CPU copies no faster than as many single elements."""


_Pieces: TypeAlias = tuple[list[tuple[Tensor, Tensor]], list[tuple[int, Tensor]]]


class Packing:
    """The layout of one bucket's live elements in one generation.

    Args:
        blocks: the live and frozen slices of each gradient, in the bucket's order; None if all of
            a gradient is live.
        gradients: views of the bucket, one for each block.
        bucket: the bucket, one-dimensional and contiguous.
        large: number of elements from which on a gradient is copied alone; ``LARGE`` by default.

    Attributes:
        blocks: the argument.
        num_live: number of live elements.
    """

    def __init__(
        self,
        blocks: Sequence[Block | None],
        gradients: Sequence[Tensor],
        bucket: Tensor,
        large: int | None = None,
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
            if not _gathers_by_index(gradient, block, LARGE if large is None else large):
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
        in_runs = sum(self._sizes[number] for run in self._runs for number in run)
        in_rows = sum(
            block.live[1].numel() * block.shape[2:].numel()
            for block in map(self.blocks.__getitem__, self._alone)
            if block is not None and len(block.live) == 2
        )
        return in_runs + in_rows

    @property
    def scratch_size(self) -> int:
        """Number of elements that ``lend`` needs."""
        return self._scratch_size

    def lend(self, scratch: Tensor) -> None:
        """Copy by way of this memory, which may serve other packings too, at other times.

        Args:
            scratch: at least ``[scratch_size]``.
        """
        self._scratch = scratch

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
        return [self._gradient(bucket, number) for number in range(len(self._layouts))]

    def pack(self, bucket: Tensor, buffer: Tensor | None = None) -> None:
        """Copy the live elements of a bucket into the buffer, or into another one."""
        indexed, alone = self._own_pieces if buffer is None else self._pieces(buffer)
        for index, part in indexed:
            torch.index_select(bucket, 0, index, out=part)
        for number, part in alone:
            gradient, block = self._gradient(bucket, number), self.blocks[number]
            if block is None:
                part.copy_(gradient)
            else:
                self._take(gradient, block, part)

    def unpack(self, bucket: Tensor, buffer: Tensor | None = None) -> None:
        """Write the buffer, or another one, to the live elements of a bucket, and exact zeros to
        its frozen ones."""
        for begin, end in self._spans_to_zero:
            bucket[begin:end].zero_()
        for number in self._rows_to_zero:
            block = self.blocks[number]
            assert block is not None
            row_writer(self._gradient(bucket, number), block.frozen[0], None)()
        self._write(bucket, buffer, is_zero=True)

    def update(self, bucket: Tensor, buffer: Tensor | None = None) -> None:
        """Write the buffer, or another one, to the live elements of a bucket; frozen ones stay
        unchanged."""
        self._write(bucket, buffer, is_zero=False)

    def _write(self, bucket: Tensor, buffer: Tensor | None, is_zero: bool) -> None:
        """See ``update``; ``is_zero`` if all frozen elements are zero."""
        indexed, alone = self._own_pieces if buffer is None else self._pieces(buffer)
        for index, part in indexed:
            # ``index_copy_`` does the same, but takes twice as long on a CPU.
            bucket.scatter_(0, index, part)
        for number, part in alone:
            gradient, block = self._gradient(bucket, number), self.blocks[number]
            if block is None:
                gradient.copy_(part)
            else:
                self._put(number, gradient, part, is_zero)

    @cached_property
    def _own_pieces(self) -> _Pieces:
        return self._pieces(self.buffer)

    def _pieces(self, buffer: Tensor) -> _Pieces:
        """Views of a buffer: of what is gathered by each index, and of what is copied alone."""
        return (
            [(index, buffer[begin : begin + index.numel()]) for index, begin in self._indices],
            [
                (number, buffer[begin : begin + shape.numel()].view(shape))
                for number in self._alone
                for begin, shape in [(self._begins[number], self._live_shapes[number])]
            ],
        )

    @cached_property
    def _rows_to_zero(self) -> list[int]:
        """Gradients of which only frozen rows become zero before live ones are written: it takes a
        CPU long to write all of a large gradient twice."""
        if self._device.type != "cpu":
            return []
        return [
            number
            for number in self._alone
            if (block := self.blocks[number]) is not None
            and 0 in block.live
            and block.num_live
            and block.shape.numel() >= _TOO_LARGE_TO_WRITE_TWICE
        ]

    @cached_property
    def _spans_to_zero(self) -> list[tuple[int, int]]:
        """Parts of the bucket that become zero: all others; one pass over contiguous memory is
        faster than a fill of every frozen slice."""
        skipped = {*self._rows_to_zero}
        spans: list[tuple[int, int]] = []
        for number, (shape, _, offset) in enumerate(self._layouts):
            begin, end = int(offset), int(offset) + prod(shape)
            if number in skipped:
                continue
            if spans and spans[-1][1] == begin:
                begin = spans.pop()[0]
            spans.append((begin, end))
        return [(begin, end) for begin, end in spans if begin < end]

    def _gradient(self, bucket: Tensor, number: int) -> Tensor:
        shape, stride, offset = self._layouts[number]
        return bucket.as_strided(shape, stride, bucket.storage_offset() + offset)

    @cached_property
    def _indices(self) -> list[tuple[Tensor, int]]:
        """For each run of neighbours that are gathered by one index: int64, where in the bucket
        their live elements are, and where in the buffer they begin."""
        indices = [(self._index(run), self._begins[run[0]]) for run in self._runs]
        _wait_for_current_stream(self._device)
        return indices

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

    def _put(self, number: int, gradient: Tensor, part: Tensor, is_zero: bool) -> None:
        block = self.blocks[number]
        if block is None or part.numel() == 0:
            return
        if len(block.live) == 2:
            columns = self._columns[number]
            for rows, part_rows, scratch in self._rows(block, part):
                if is_zero:
                    scratch.zero_()
                else:
                    torch.index_select(gradient, 0, rows, out=scratch)
                scratch.view(rows.numel(), -1).scatter_(
                    1, columns.expand(rows.numel(), -1), part_rows.view(rows.numel(), -1)
                )
                write_rows(gradient, rows, scratch)
        else:
            ((dim, live),) = block.live.items()
            if dim == 0:
                write_rows(gradient, live, part)
            else:
                gradient.index_copy_(dim, live, part)

    @cached_property
    def _columns(self) -> dict[int, Tensor]:
        """By the number of every gradient that is copied by rows and columns, int64: where in a row
        its live elements are."""
        columns: dict[int, Tensor] = {}
        for number in self._alone:
            block = self.blocks[number]
            if block is not None and len(block.live) == 2:
                in_row = torch.arange(block.shape[1:].numel(), device=self._device)
                live = in_row.view(block.shape[1], -1).index_select(0, block.live[1])
                columns[number] = live.flatten()
        _wait_for_current_stream(self._device)
        return columns


def _wait_for_current_stream(device: torch.device) -> None:
    """Let the host wait for indices, once a generation: a later pass may read them on another
    stream, which does not wait for the one that they were made on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _rows_at_once(shape: torch.Size) -> int:
    return max(1, _ROWS_AT_ONCE // shape[1:].numel())


def _gathers_by_index(gradient: Tensor, block: Block | None, large: int) -> bool:
    """Whether a gradient is copied element by element, by an index that its neighbours share,
    rather than alone, by rows and columns.

    On an accelerator the number of operations counts.  A CPU copies a long row at once several
    times faster than its elements; blocks of rows and columns take the same time in both ways.
    """
    if gradient.numel() >= large:
        return False
    if gradient.device.type != "cpu" or gradient.numel() < _SMALL_ON_CPU:
        return True
    has_long_rows = gradient.shape[1:].numel() >= _SHORT_ROW
    is_of_rows = block is None or block.live.keys() == {0}
    return not (is_of_rows and has_long_rows)


def with_parameter_strides(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A bucket's gradient with the strides in which DDP stored it: those of its dense parameter.
    ``GradBucket.gradients`` views it as contiguous, which is wrong in channels_last."""
    if parameter.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())
