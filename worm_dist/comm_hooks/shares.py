"""Shares: reduce-scatter and all-gather where the ranks' shares differ in length.

Both collectives need equal lengths, but the ranks' numbers of live elements differ.  So all shares
are put one after another and cut into chunks of equal length, a chunk for each rank.  A chunk
begins a little before or after the share of its rank: what it has of other shares is moved to their
owners after a reduce-scatter, or by them before an all-gather, in one all-to-all.  That is at most
a few per cent of the elements, each of them sent once.  Where even that is not worth a collective,
every share is padded to the longest instead.  Two ranks gather without chunks: each sends its share
to the other.

All ranks know the lengths of all shares, so they choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from ..distributed.flat_collectives import all_gather

__all__ = ["Shares"]

_BYTES_OF_A_COLLECTIVE = 2**15
"""Bytes that are sent in the time that one more collective takes to start: about 20 microseconds at
13 Gbit/s."""


class Shares:
    """Where each rank's share is in the memory that the collectives are given.

    On a GPU all methods queue their work on the current stream, which waits for the all-to-all; the
    host does not.

    Args:
        sizes: number of elements of each rank's share.
        element_size: bytes of an element.
        rank: this rank.

    Attributes:
        num_elements: of the memory of all shares; a multiple of the number of ranks.
        num_reduced, num_gathered: number of elements that a rank hands over, averaged over the
            ranks; comparable to those of all shares, and of one.
    """

    def __init__(self, sizes: Sequence[int], element_size: int, rank: int) -> None:
        num_ranks, total = len(sizes), sum(sizes)
        self._sizes, self._rank = sizes, rank
        longest, self._chunk_size = max(sizes), -(-total // num_ranks)
        *begins, _ = accumulate(sizes, initial=0)
        chunks = [
            (number * self._chunk_size, (number + 1) * self._chunk_size)
            for number in range(num_ranks)
        ]
        shares = [(begin, begin + size) for begin, size in zip(begins, sizes)]
        num_moved = (total - sum(map(_overlap, chunks, shares))) // num_ranks
        saved = (num_ranks - 1) * (longest - self._chunk_size) - num_moved
        self._is_padded = saved * element_size <= _BYTES_OF_A_COLLECTIVE
        if self._is_padded:
            num_moved, self._chunk_size = 0, longest
            begins = [number * longest for number in range(num_ranks)]
        self._begins = begins
        self.num_elements = num_ranks * self._chunk_size
        self.num_reduced = self.num_elements + num_moved
        self.num_gathered = self._chunk_size + num_moved if num_ranks != 2 else total // 2
        # How much of this rank's chunk is each rank's, and how much of its share each rank has.
        self._owners = [_overlap(chunks[rank], share) for share in shares]
        self._holders = [_overlap(chunk, shares[rank]) for chunk in chunks]

    @property
    def num_own(self) -> int:
        """Number of elements of this rank's share."""
        return self._sizes[self._rank]

    def of_ranks(self, memory: Tensor) -> list[Tensor]:
        """Every rank's share.

        Args:
            memory: ``[num_elements]``.
        """
        places = zip(self._begins, self._sizes, strict=True)
        return [memory[begin : begin + size] for begin, size in places]

    def clear_padding(self, memory: Tensor) -> None:
        """Write zeros where no share is, so that nothing is reduced that nobody has written."""
        ends = [begin + size for begin, size in zip(self._begins, self._sizes, strict=True)]
        for end, begin in zip(ends, [*self._begins[1:], self.num_elements], strict=True):
            if end < begin:
                memory[end:begin].zero_()

    def chunk(self, memory: Tensor) -> Tensor:
        """This rank's chunk, which a reduce-scatter writes and an all-gather reads."""
        begin = self._rank * self._chunk_size
        return memory[begin : begin + self._chunk_size]

    def to_owners(self, chunk: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's share, from the chunks that have been reduced.  Collective.

        Args:
            chunk: this rank's.
            group: the process group.
        """
        if self._is_padded:
            return chunk[: self.num_own]
        own = chunk.new_empty(self.num_own)
        filled = chunk[: sum(self._owners)]
        dist.all_to_all_single(own, filled, self._holders, self._owners, group=group)
        return own

    def all_gather(self, own: Tensor, memory: Tensor, group: dist.ProcessGroup) -> dist.Work:
        """Gather all shares.  Collective.

        Args:
            own: this rank's share.
            memory: ``[num_elements]``, receives the shares.
            group: the process group.

        Returns:
            What to wait for.
        """
        if len(self._sizes) == 2:
            return self._exchange(own, memory, group)
        chunk = self.chunk(memory)
        if self._is_padded:
            chunk[: self.num_own] = own
        else:
            filled = chunk[: sum(self._owners)]
            dist.all_to_all_single(filled, own, self._owners, self._holders, group=group)
        return all_gather(memory, chunk, group)

    def _exchange(self, own: Tensor, memory: Tensor, group: dist.ProcessGroup) -> dist.Work:
        """Gather the shares of two ranks; see ``all_gather``."""
        places, other = self.of_ranks(memory), 1 - self._rank
        places[self._rank].copy_(own)
        received, sent = [0, 0], [0, 0]
        received[other], sent[other] = self._sizes[other], self.num_own
        work = dist.all_to_all_single(
            places[other], own, received, sent, group=group, async_op=True
        )
        assert work is not None
        return work


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Number of elements that two spans have in common."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
