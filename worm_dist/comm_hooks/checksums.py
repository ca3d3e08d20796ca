"""Checksums: detect that an average of packed gradients is not what the ranks have put in.

Memory, a network card or a link that changes bits without a report spoils a training silently.
Behind its live elements each rank sends their sum and their norm; the all-reduce adds these up like
the elements, so the sum of what arrives must be the sum that arrives, up to rounding.

Elements are rounded in each of the W - 1 additions of W ranks, and so is the sum, by half of the
dtype's eps of what has been added so far: together at most W * eps * L1, where L1, the sum of all
magnitudes, is at most sqrt(n) times the norm.  That is a strict bound.  torch sums n elements in
float32 in a tree of blocks, whose errors have random signs; ``_OF_A_SUM`` times eps * L1 is far
above what they come to, but no strict bound.  The tolerance is twice the one and the other.  Of
three million elements on two ranks a change of one by 13 times their root mean square is found;
with bfloat16 only wild values are.  Sums in float64 would find 1.5 times, and take ten times as
long on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..host_copy import HostCopy

__all__ = ["NUM_CHECKSUMS", "Checksums"]

NUM_CHECKSUMS = 2
"""Elements behind the live ones: their sum and their L2 norm."""
_OF_A_SUM = 32
"""Rounding of a float32 sum, in units of eps times the sum of all magnitudes."""


class _Sum(NamedTuple):
    """What has arrived of one bucket.

    Attributes:
        parameters: the bucket's parameters.
        tolerance: of the sum, in units of the norm.
        sums: ``[3]`` on the elements' device: their sum, and the sums of the ranks' checksums.
    """

    parameters: Sequence[Tensor]
    tolerance: float
    sums: Tensor


class Checksums:
    """The checksums of all buckets since the last optimizer step.

    What has arrived is summed on streams from a pool, for which the caching allocator would keep
    the memory of every new tensor; so it is summed into tensors that are used again.

    Args:
        world_size: number of ranks that are averaged over.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._sums: list[_Sum] = []
        self._pending: tuple[HostCopy, list[_Sum]] | None = None
        self._unused: dict[torch.dtype, list[Tensor]] = {}

    def put(self, elements: Tensor, out: Tensor) -> None:
        """Write this rank's checksums.

        Args:
            elements: what it puts in, ``[n]``.
            out: ``[2]``, sent behind the elements.
        """
        torch.sum(elements, dim=0, out=out[0])
        torch.linalg.vector_norm(elements, out=out[1])

    def take(self, parameters: Sequence[Tensor], averaged: Tensor, expected: Tensor) -> None:
        """Sum what has arrived.  Does not wait for the device.

        Args:
            parameters: the bucket's parameters.
            averaged: the elements, ``[n]``, in the dtype in which they were sent.
            expected: ``[2]``, what has arrived behind them.
        """
        of_ranks = 2 * self._world_size * torch.finfo(averaged.dtype).eps
        dtype = torch.promote_types(averaged.dtype, torch.float32)
        of_sums = _OF_A_SUM * torch.finfo(dtype).eps
        tolerance = (of_ranks + of_sums) * sqrt(averaged.numel())
        try:  # several threads take: a list's methods are atomic
            sums = self._unused.setdefault(dtype, []).pop()
        except IndexError:
            sums = torch.empty(3, dtype=dtype, device=averaged.device)
        torch.sum(averaged, dim=0, dtype=dtype, out=sums[0])
        sums[1:].copy_(expected)
        self._sums.append(_Sum(parameters, tolerance, sums))

    def wrong(self) -> Sequence[Tensor] | None:
        """Compare the sums since the last call; the parameters of the first wrong bucket, if any.

        On a GPU the result is that of the sums before, so that the host need not wait; without new
        sums, that of the newest.
        """
        newest = None
        if self._sums:
            newest = self._compare(self._sums), self._sums
            for each in self._sums:
                self._unused[each.sums.dtype].append(each.sums)
            self._sums = []
        ready, self._pending = self._pending, newest
        if newest is not None and not newest[0].is_late:
            ready, self._pending = newest, None
        if ready is None:
            return None
        copy, sums = ready
        numbers = copy.read().nonzero().flatten().tolist()
        return sums[numbers[0]].parameters if numbers else None

    @staticmethod
    def _compare(sums: Sequence[_Sum]) -> HostCopy:
        """bool ``[buckets]``, whether each is wrong."""
        # Copied before the next pass overwrites them.
        total, expected, norm = torch.stack([each.sums for each in sums]).double().unbind(1)
        tolerance = torch.tensor([each.tolerance for each in sums], dtype=torch.float64)
        allowed = norm * tolerance.to(norm.device, non_blocking=True)
        # False for NaN and infinity: an overflow is no fault of the all-reduce.
        return HostCopy((total - expected).abs() > allowed)
