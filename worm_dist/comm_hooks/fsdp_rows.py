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

from ..distributed.flat_collectives import reduce_scatter
from ..groups.freeze_plan import Block
from .packing import LARGE, Packing
from .shares import Shares

__all__ = ["PackedRows", "is_any_frozen", "pieces_of"]

_Piece = tuple[int, int, int, int]


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

    All ranks know all layouts.  How shares of unequal length are sent is described in ``shares``.

    The memory to send from is lent for each call, so that one piece of it serves all groups.  On a
    GPU memory is lent on one stream alone, that of torch for collectives of one kind: what packs,
    sends and unpacks is queued there in order, so memory is not written to before the collective
    that reads it is over.  What torch reads afterwards, on other streams, are its own
    tensors, and it waits for that stream itself.

    Args:
        shapes: the shapes of the group's parameters, in its order.
        blocks: the live part of each of them; None if all of it is live.
        row_like: a row, for dtype and device.
        rank, num_ranks: this rank, and the number of ranks.

    Attributes:
        shares: how the live elements are sent.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        blocks: Sequence[Block | None],
        row_like: Tensor,
        rank: int,
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
        sizes = [packing.num_live for packing in self._packings]
        self.shares = Shares(sizes, row_like.element_size(), rank)
        self._own = self._packings[rank]
        self._scratch_size = max(packing.scratch_size for packing in self._packings)

    def of_rank(self, rank: int) -> Packing:
        """The live elements of one rank's row; memory is to be lent to it before it is used."""
        return self._packings[rank]

    @property
    def num_indices(self) -> int:
        """Number of indices that are kept, each of eight bytes, besides those of the blocks."""
        return sum(packing.num_indices for packing in self._packings)

    @property
    def lent_size(self) -> int:
        """Number of elements of memory that the collectives need."""
        return self.shares.num_elements + self._own.num_live + self._scratch_size

    def _divided(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Lent memory: of all shares, and of this rank's."""
        sizes = [self.shares.num_elements, self._own.num_live, self._scratch_size]
        of_all, own, scratch = memory[: self.lent_size].split(sizes)
        for packing in self._packings:
            packing.lend(scratch)
        return of_all, own

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
        of_all, _ = self._divided(memory)
        shares = self.shares.of_ranks(of_all)
        for row, packing, share in zip(rows, self._packings, shares, strict=True):
            packing.pack(row, share)
        self.shares.clear_padding(of_all)
        chunk = self.shares.chunk(of_all)
        if of_all.numel():
            reduce_scatter(chunk, of_all, group, op)
        self._own.unpack(out, self.shares.to_owners(chunk, group))

    def all_gather(
        self, rows: Tensor, row: Tensor, group: dist.ProcessGroup, memory: Tensor
    ) -> None:
        """Send the live elements of this rank's row and receive those of the others; write zeros to
        the frozen ones, in every row.

        Args:
            rows: ``[num_ranks, elements of a row]``, receives the rows.
            row: this rank's own row, which may be a view of ``rows``.
            group: the process group.
            memory: at least ``[lent_size]``; what is in it before and after has no meaning.
        """
        of_all, own = self._divided(memory)
        self._own.pack(row, own)
        if of_all.numel():
            # On a GPU the current stream waits, not the host.
            self.shares.all_gather(own, of_all, group).wait()
        shares = self.shares.of_ranks(of_all)
        for row, packing, share in zip(rows, self._packings, shares, strict=True):
            packing.unpack(row, share)


def is_any_frozen(blocks: Mapping[Tensor, Block] | None, parameters: Sequence[Tensor]) -> bool:
    """Whether any of these parameters has a frozen part."""
    return blocks is not None and not blocks.keys().isdisjoint(parameters)
