"""Resharding: the elements that survive a cut move from the ranks' old shards to their new ones.

They move in pieces of limited size: every rank puts in what its old shards have of a piece, the
ranks merge it, and every rank keeps what its new shards have of it.  So no rank ever holds a full
tensor, and what moves are bytes, of any dtype.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.full_state import bits_of
from ..distributed import byte_streams
from ..distributed.collectives import Communicator

__all__ = ["Move", "Part", "Survivors", "buffer_for", "reshard"]

_ALIGNMENT = 16
"""Bytes; the elements of a span begin at a multiple, so that they can be viewed in their dtype."""

_BLOCK_ELEMENTS = 1 << 18
"""Elements that are selected at once; their indices take eight bytes each."""


class Part(NamedTuple):
    """Consecutive elements of a tensor.

    Attributes:
        begin: index of the first one in the flattened tensor.
        elements: the elements, one-dimensional.
    """

    begin: int
    elements: Tensor


class Survivors:
    """The elements of a tensor that are left after a cut, in order.

    Args:
        shape: the tensor's shape before the cut.
        kept: int64, the kept indices in increasing order, by cut dimension.
    """

    def __init__(self, shape: Sequence[int], kept: Mapping[int, Tensor]) -> None:
        sizes: list[int] = []
        self._kept: list[list[int] | None] = []
        for dim, size in enumerate(shape or (1,)):
            indices = kept[dim].tolist() if dim in kept else None
            if indices is None and self._kept and self._kept[-1] is None:
                sizes[-1] *= size  # adjacent dimensions that are not cut are one
            else:
                sizes.append(size)
                self._kept.append(indices)
        left = [n if k is None else len(k) for n, k in zip(sizes, self._kept, strict=True)]
        self._strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
        self._left_strides = [math.prod(left[dim + 1 :]) for dim in range(len(left))]
        self.is_cut = any(indices is not None for indices in self._kept)
        self.count = math.prod(left)

    def before(self, index: int) -> int:
        """Number of survivors before an index of the flattened tensor."""
        count = 0
        for kept, stride, left in zip(self._kept, self._strides, self._left_strides, strict=True):
            at, index = divmod(index, stride) if stride else (0, 0)
            number = at if kept is None else bisect.bisect_left(kept, at)
            count += number * left
            if kept is not None and (number == len(kept) or kept[number] != at):
                break
        return count

    def indices(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Indices in the flattened tensor, int64, of the survivors from one number to another."""
        rest = torch.arange(begin, end, device=device)
        found = torch.zeros_like(rest)
        for kept, stride, left in zip(self._kept, self._strides, self._left_strides, strict=True):
            at = rest if left == 1 else rest.div(left, rounding_mode="floor")
            rest = rest - at * left
            if kept is not None:
                at = torch.tensor(kept, device=device)[at]
            found += at * stride
        return found


class Move(NamedTuple):
    """A tensor that moves.

    Attributes:
        survivors: what is left of it.
        dtype: its dtype, the same on all ranks.
        sources: what this rank has of it before the cut; no other rank has the same elements.
        targets: what this rank needs of it after the cut.
    """

    survivors: Survivors
    dtype: torch.dtype
    sources: Sequence[Part]
    targets: Sequence[Part]


class _Span(NamedTuple):
    """Consecutive survivors of a move, and the place of their bytes in a piece."""

    move: Move
    begin: int
    end: int
    offset: int

    def within(self, piece: Tensor) -> Tensor:
        length = (self.end - self.begin) * self.move.dtype.itemsize
        return piece[self.offset : self.offset + length].view(self.move.dtype)


def buffer_for(moves: Sequence[Move], device: torch.device) -> Tensor:
    """Memory for the pieces of these moves: uint8, of ``PIECE_BYTES`` at most."""
    sizes = (move.survivors.count * move.dtype.itemsize + _ALIGNMENT for move in moves)
    num_bytes = min(sum(sizes), byte_streams.PIECE_BYTES)
    aligned = max(num_bytes - num_bytes % -_ALIGNMENT, _ALIGNMENT)
    return torch.empty(aligned, dtype=torch.uint8, device=device)


@torch.no_grad()
def reshard(moves: Sequence[Move], comm: Communicator, buffer: Tensor) -> None:
    """Move tensors.  Collective; all collectives are issued even if this rank fails.

    Args:
        moves: the same tensors in the same order on all ranks.
        comm: the communicator of the ranks.
        buffer: the memory of ``buffer_for``, of the same size on all ranks.

    Raises:
        Exception: whatever went wrong on this rank, after the last collective.
    """
    failure: Exception | None = None
    for spans in _pieces(moves, buffer.numel()):
        end = spans[-1].offset + (spans[-1].end - spans[-1].begin) * spans[-1].move.dtype.itemsize
        piece = buffer[: end + -end % _ALIGNMENT]
        piece.zero_()
        failure = failure or _failure_of(_put_in, spans, piece)
        comm.merge_disjoint(piece.view(torch.int32))
        failure = failure or _failure_of(_take_out, spans, piece)
    if failure is not None:
        raise failure


def _failure_of(
    work: Callable[[Sequence[_Span], Tensor], None], spans: Sequence[_Span], piece: Tensor
) -> Exception | None:
    try:
        work(spans, piece)
    except Exception as error:  # the other ranks must not wait for this one
        return error
    return None


def _pieces(moves: Sequence[Move], num_bytes: int) -> Iterator[list[_Span]]:
    spans: list[_Span] = []
    offset = 0
    for move in moves:
        begin, count, item = 0, move.survivors.count, move.dtype.itemsize
        while begin < count:
            end = min(count, begin + (num_bytes - offset) // item)
            if end > begin:
                spans.append(_Span(move, begin, end, offset))
                offset += (end - begin) * item
                offset += -offset % _ALIGNMENT
                begin = end
            if offset >= num_bytes:
                yield spans
                spans, offset = [], 0
    if spans:
        yield spans


def _put_in(spans: Sequence[_Span], piece: Tensor) -> None:
    for span in spans:
        survivors, target = span.move.survivors, bits_of(span.within(piece))
        for begin, elements in span.move.sources:
            source = bits_of(elements)
            first = max(span.begin, survivors.before(begin))
            last = min(span.end, survivors.before(begin + elements.numel()))
            if first < last and not survivors.is_cut:
                target[first - span.begin : last - span.begin] = source[
                    first - begin : last - begin
                ]
                continue
            for block in range(first, last, _BLOCK_ELEMENTS):
                end = min(block + _BLOCK_ELEMENTS, last)
                indices = survivors.indices(block, end, source.device) - begin
                out = target[block - span.begin : end - span.begin]
                torch.index_select(source, 0, indices, out=out)


def _take_out(spans: Sequence[_Span], piece: Tensor) -> None:
    for span in spans:
        source = bits_of(span.within(piece))
        for begin, elements in span.move.targets:
            first = max(span.begin, begin)
            last = min(span.end, begin + elements.numel())
            if first < last:
                bits_of(elements)[first - begin : last - begin] = source[
                    first - span.begin : last - span.begin
                ]
