"""FSDP rows: what ``fully_shard`` hands to its collectives, and the live elements in it.

A group of parameters is gathered and reduced as a matrix with a row for each rank.  In a row the
rank's rows of every parameter follow one another, each padded to the most that a rank has of it.
The collectives are told nothing of that, so it is computed here from the parameters' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..groups.freeze_plan import Block
from .packing import LARGE, Packing

__all__ = ["PackedRows", "pieces_of"]

_Piece = tuple[int, int, int, int]

_BYTES_OF_A_COLLECTIVE = 2**15
"""Bytes that are sent in the time that one more collective takes to start: about 20 microseconds at
13 Gbit/s."""


def pieces_of(shapes: Sequence[torch.Size], num_ranks: int) -> tuple[list[list[_Piece]], int]:
    """The pieces of parameters in the row of each rank, and the number of elements of a row.

    Args:
        shapes: the shapes of the group's parameters, in its order.
        num_ranks: number of ranks.

    Returns:
        For each rank, for each parameter of which it has any: the parameter's number, the first of
        its rows, how many, and the index of their first element in the rank's row; and the number
        of elements of a row.
    """
    pieces: list[list[_Piece]] = [[] for _ in range(num_ranks)]
    offset = 0
    for number, shape in enumerate(shapes):
        most = -(-shape[0] // num_ranks)
        for rank in range(num_ranks):
            first = min(rank * most, shape[0])
            num_rows = min(most, shape[0] - first)
            if num_rows * shape[1:].numel():
                pieces[rank].append((number, first, num_rows, offset))
        offset += most * shape[1:].numel()
    return pieces, offset


class PackedRows:
    """The live elements of every rank's row, for one generation.

    They are sent as a matrix with equal rows, because these are what reduce-scatter and all-gather
    need.  The ranks' numbers of live elements differ.  Shorter rows are padded, and what a rank has
    beyond the length of all rows is sent by a collective of its own; the length is the one that
    costs least.  All ranks know all layouts, so they decide alike.

    The memory to send from is lent for each call, so that one piece of it serves all groups.  On a
    GPU memory is lent on one stream alone, that of torch for collectives of one kind: what packs,
    sends and unpacks is queued there in order, so memory is not written to before the collective
    that reads it is over.  What torch reads afterwards, on other streams, are its own
    tensors, and it waits for that stream itself.

    Args:
        shapes: the shapes of the group's parameters, in its order.
        blocks: the live part of each of them; None if all of it is live.
        row_like: a row, for dtype and device.
        num_ranks: number of ranks.

    Attributes:
        num_padded: number of elements of a row of the matrix.
        surplus: for each rank, number of its elements that are sent separately.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        blocks: Sequence[Block | None],
        row_like: Tensor,
        num_ranks: int,
    ) -> None:
        pieces, size = pieces_of(shapes, num_ranks)
        assert row_like.numel() == size
        self._packings = []
        for of_rank in pieces:
            views, parts = [], []
            for number, first, num_rows, offset in of_rank:
                shape, block = shapes[number], blocks[number]
                num = num_rows * shape[1:].numel()
                views.append(row_like[offset : offset + num].view(num_rows, *shape[1:]))
                parts.append(None if block is None else block.rows(first, num_rows))
            # Of a large parameter every rank's piece is copied alone: an index for each element of
            # all of them would take more memory than the rank's own weights.
            self._packings.append(Packing(parts, views, row_like, max(1, LARGE // num_ranks)))
        self._shares = [packing.num_live for packing in self._packings]
        self.num_padded = _even_share(self._shares, row_like.element_size())
        self.surplus = [max(0, share - self.num_padded) for share in self._shares]
        self._scratch_size = max(packing.scratch_size for packing in self._packings)

    def of_rank(self, rank: int) -> Packing:
        """The live elements of one rank's row; memory is to be lent to it before it is used."""
        return self._packings[rank]

    @property
    def lent_size(self) -> int:
        """Number of elements of memory that the collectives need."""
        num_ranks = len(self._shares)
        return (num_ranks + 1) * self.num_padded + sum(self._shares) + self._scratch_size

    def _divided(self, memory: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Lent memory as this rank's row of the matrix, the matrix, and every rank's elements."""
        num_ranks, num_padded = len(self._shares), self.num_padded
        sizes = [num_padded, num_ranks * num_padded, *self._shares, self._scratch_size]
        own, matrix, *elements, scratch = memory[: self.lent_size].split(sizes)
        for packing in self._packings:
            packing.lend(scratch)
        return own, matrix.view(num_ranks, num_padded), elements

    @property
    def num_elements(self) -> int:
        """Number of elements that all rows are sent as, padding included."""
        return len(self._shares) * self.num_padded + sum(self.surplus)

    def reduce_scatter(
        self,
        out: Tensor,
        rows: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        memory: Tensor,
    ) -> None:
        """Reduce the live elements of every row to its rank, and write zeros to the frozen ones.

        Args:
            out: ``[elements of a row]``, receives this rank's row.
            rows: ``[num_ranks, elements of a row]``.
            group: the process group.
            op: how elements are reduced.
            memory: at least ``[lent_size]``; what is in it before and after has no meaning.
        """
        rank, (own_row, matrix, elements) = dist.get_rank(group), self._divided(memory)
        for row, packing, live, padded in zip(rows, self._packings, elements, matrix, strict=True):
            packing.pack(row, live)
            padded[: len(live)] = live[: self.num_padded]
            padded[len(live) :] = 0
        if self.num_padded:
            _reduce_scatter(own_row, matrix.view(-1), group, op)
        works = [
            dist.reduce(live[self.num_padded :], group=group, group_dst=to, op=op, async_op=True)
            for to, (live, num) in enumerate(zip(elements, self.surplus, strict=True))
            if num
        ]
        for work in works:
            assert work is not None
            work.wait()  # on a GPU the current stream waits, not the host
        own = elements[rank]
        own[: self.num_padded] = own_row[: len(own)]
        self._packings[rank].unpack(out, own)

    def all_gather(self, rows: Tensor, group: dist.ProcessGroup, memory: Tensor) -> None:
        """Send the live elements of this rank's row and receive those of the others; write zeros to
        the frozen ones, in every row.

        Args:
            rows: ``[num_ranks, elements of a row]``, with this rank's own row.
            group: the process group.
            memory: at least ``[lent_size]``; what is in it before and after has no meaning.
        """
        rank, (own_row, matrix, elements) = dist.get_rank(group), self._divided(memory)
        own = elements[rank]
        self._packings[rank].pack(rows[rank], own)
        own_row[: len(own)] = own[: self.num_padded]
        own_row[len(own) :] = 0
        if self.num_padded:
            _all_gather(matrix.view(-1), own_row, group)
        works = [
            dist.broadcast(live[self.num_padded :], group=group, group_src=of, async_op=True)
            for of, (live, num) in enumerate(zip(elements, self.surplus, strict=True))
            if num
        ]
        for work in works:
            assert work is not None
            work.wait()
        for row, packing, live, padded in zip(rows, self._packings, elements, matrix, strict=True):
            live[: self.num_padded] = padded[: len(live)]
            packing.unpack(row, live)


def is_any_frozen(blocks: Mapping[Tensor, Block] | None, parameters: Sequence[Tensor]) -> bool:
    """Whether any of these parameters has a frozen part."""
    return blocks is not None and not blocks.keys().isdisjoint(parameters)


def _even_share(shares: Sequence[int], element_size: int) -> int:
    """The length of all rows that costs least.

    Args:
        shares: live elements of each rank's row.
        element_size: bytes of an element.
    """

    def cost(length: int) -> int:
        longer = [share - length for share in shares if share > length]
        num_elements = len(shares) * length + sum(longer)
        return num_elements * element_size + len(longer) * _BYTES_OF_A_COLLECTIVE

    return min(sorted(set(shares), reverse=True), key=cost)


def _reduce_scatter(out: Tensor, rows: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> None:
    # torch 2.14 renamed both functions and warns about the old names.
    single = getattr(dist, "reduce_scatter_single", None)
    (single or dist.reduce_scatter_tensor)(out, rows, group=group, op=op)


def _all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    single = getattr(dist, "all_gather_single", None)
    (single or dist.all_gather_into_tensor)(out, own, group=group)
