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
from .packing import Packing

__all__ = ["PackedRows", "pieces_of"]

_Piece = tuple[int, int, int, int]

_BYTES_OF_A_COLLECTIVE = 2**16
"""Bytes that are sent in the time that one more collective takes to start: about 20 microseconds at
25 Gbit/s."""


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

    The buffers are kept for the generation.  On a GPU torch calls the collectives of one kind on
    one stream of its own, one group after the other: what packs, sends and unpacks is queued there
    in order, so a buffer is not written to before the collective that reads it is over.  What torch
    reads afterwards, on other streams, are its own tensors, and it waits for that stream itself.

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
            self._packings.append(Packing(parts, views, row_like))
        self._shares = [packing.num_live for packing in self._packings]
        self.num_padded = _even_share(self._shares, row_like.element_size())
        self.surplus = [max(0, share - self.num_padded) for share in self._shares]
        self._matrix = row_like.new_zeros(num_ranks, self.num_padded)
        self._own = row_like.new_zeros(self.num_padded)
        self._scratch = [row_like.new_empty(share) for share in self._shares]

    @property
    def num_elements(self) -> int:
        """Number of elements that all rows are sent as, padding included."""
        return len(self._shares) * self.num_padded + sum(self.surplus)

    def reduce_scatter(
        self, out: Tensor, rows: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp
    ) -> None:
        """Reduce the live elements of every row to its rank, and write zeros to the frozen ones.

        Args:
            out: ``[elements of a row]``, receives this rank's row.
            rows: ``[num_ranks, elements of a row]``.
            group: the process group.
            op: how elements are reduced.
        """
        rank = dist.get_rank(group)
        for row, packing, scratch, padded in zip(
            rows, self._packings, self._scratch, self._matrix, strict=True
        ):
            packing.pack(row, scratch)
            padded[: len(scratch)] = scratch[: self.num_padded]
        if self.num_padded:
            _reduce_scatter(self._own, self._matrix.view(-1), group, op)
        works = [
            dist.reduce(scratch[self.num_padded :], group=group, group_dst=to, op=op, async_op=True)
            for to, (scratch, num) in enumerate(zip(self._scratch, self.surplus, strict=True))
            if num
        ]
        for work in works:
            assert work is not None
            work.wait()  # on a GPU the current stream waits, not the host
        own = self._scratch[rank]
        own[: self.num_padded] = self._own[: len(own)]
        self._packings[rank].unpack(out, own)

    def all_gather(self, rows: Tensor, group: dist.ProcessGroup) -> None:
        """Send the live elements of this rank's row and receive those of the others; write zeros to
        the frozen ones, in every row.

        Args:
            rows: ``[num_ranks, elements of a row]``, with this rank's own row.
            group: the process group.
        """
        rank = dist.get_rank(group)
        own = self._scratch[rank]
        self._packings[rank].pack(rows[rank], own)
        self._own[: len(own)] = own[: self.num_padded]
        if self.num_padded:
            _all_gather(self._matrix.view(-1), self._own, group)
        works = [
            dist.broadcast(scratch[self.num_padded :], group=group, group_src=of, async_op=True)
            for of, (scratch, num) in enumerate(zip(self._scratch, self.surplus, strict=True))
            if num
        ]
        for work in works:
            assert work is not None
            work.wait()
        for row, packing, scratch, padded in zip(
            rows, self._packings, self._scratch, self._matrix, strict=True
        ):
            scratch[: self.num_padded] = padded[: len(scratch)]
            packing.unpack(row, scratch)


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
