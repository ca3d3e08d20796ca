"""Low rank: PowerSGD of what lives (arXiv 1905.13727), by torch's own hook.

torch's hook asks a bucket for its buffer, its gradients, its number and whether it is the last one,
and for nothing else; so it works as well on a stand-in that has the live parts.  What it remembers
of a bucket lies as these parts do, and has to follow when other channels freeze.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from .averaging import Payload, completed
from .packing import Packing

__all__ = ["LowRank"]

_EXACT_PASSES = 2
"""DDP arranges its buckets anew after the first pass, and torch's hook begins no sooner than here;
until then it averages everything exactly."""

_TINY = 1e-8
"""Added to the length of a vector before the vector is divided by it.  A layer behind channels that
have all faded has a gradient of zeros only; torch's default adds nothing, and makes NaN of it."""

_SPARK = 1e-7


class LowRank:
    """Every matrix of live gradients becomes the product of two thin ones, and these are averaged;
    what that leaves out is added to the rank's next gradient.  Vectors, and matrices that are
    hardly larger than the thin ones, are averaged exactly.

    Args:
        process_group: that of the wrapper.
        rank: columns of the thin matrices.
    """

    def __init__(self, process_group: dist.ProcessGroup, rank: int) -> None:
        self._state = PowerSGDState(
            process_group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=_EXACT_PASSES,
            orthogonalization_epsilon=_TINY,
        )
        self._numbers: dict[tuple[int, ...], int] = {}
        self._packings: dict[int, Packing | None] = {}

    def start(self, payload: Payload) -> tuple[torch.futures.Future[None], int]:
        """See ``Averaging``; the future is done already.

        The later collectives of a bucket start from callbacks.  gloo runs these in several threads,
        so that with two buckets in flight the ranks would start them in different orders, and the
        process aborts: one bucket has to wait for the other.  NCCL runs them at once, in the thread
        that starts the bucket, each on a CUDA stream that has waited for the collective before it;
        to wait then means that the stream of the backward pass waits too, which costs nothing more:
        torch's hook has synchronised the device by then.
        """
        state, elements = self._state, payload.elements
        number = self._numbers.setdefault(payload.bucket, len(self._numbers))
        self._follow(number, payload)
        bucket = cast(GradBucket, _LiveBucket(number, payload))
        if elements.numel() == 0:
            # The last bucket of a pass counts the passes, also if nothing lives in it.
            state.maybe_increase_iter(bucket)
            return completed(elements), 0

        self._rekindle(number)
        exact = state.iter < state.start_powerSGD_iter
        num_sent_before = state.total_numel_after_compression
        powerSGD_hook(state, bucket).wait()
        num_sent = state.total_numel_after_compression - num_sent_before
        if exact:
            num_sent = elements.numel()  # torch counts only what it compresses
        elif not bool(elements.sum().isfinite()):
            # An overflow, such as loss scaling provokes, must not be remembered for ever.  All
            # ranks see it, and begin anew with this bucket.
            state.error_dict.pop(number)
            self._forget_matrices(number)
        return completed(elements), num_sent * elements.element_size()

    def _follow(self, number: int, payload: Payload) -> None:
        """Carry what is remembered of a bucket over to another packing.

        What was left out of an element's gradient is kept with the element, if it lives on; one
        that thaws begins with nothing.  The thin matrices have other sizes now, and are drawn anew,
        alike on all ranks.
        """
        before = self._packings.get(number, payload.packing)
        self._packings[number] = payload.packing
        left_out = self._state.error_dict.get(number)
        if before is not payload.packing and left_out is not None:
            self._state.error_dict[number] = _repacked(left_out, before, payload)
            self._forget_matrices(number)

    def _forget_matrices(self, number: int) -> None:
        self._state.p_memory_dict.pop(number, None)
        self._state.q_memory_dict.pop(number, None)

    def _rekindle(self, number: int) -> None:
        """A matrix whose gradient was all zeros in one pass has got a thin matrix of zeros, and
        would be approximated by zeros ever after.  Something tiny in their place, alike on all
        ranks, is enough to find its way back; it is lost in rounding beside anything else."""
        thin = self._state.q_memory_dict.get(number)
        if thin is not None:
            thin.masked_fill_(thin == 0, _SPARK)


class _LiveBucket:
    """What torch's hook asks of a bucket, answered with what lives of it."""

    def __init__(self, number: int, payload: Payload) -> None:
        self._number = number
        self._payload = payload

    def index(self) -> int:
        """The hook remembers by this number.  It is that of the bucket's parameters and not the
        bucket's own, which means another bucket once DDP has arranged them anew."""
        return self._number

    def is_last(self) -> bool:
        return self._payload.is_last

    def buffer(self) -> Tensor:
        return self._payload.elements

    def gradients(self) -> list[Tensor]:
        # Scalars as vectors: the hook takes everything for a matrix of so many rows.
        parts = (part for part in self._payload.parts if part.numel() > 0)
        return [part if part.dim() > 0 else part.view(1) for part in parts]


def _repacked(elements: Tensor, before: Packing | None, payload: Payload) -> Tensor:
    """Elements that were packed as ``before``, packed as the payload is; zero if not among them."""
    whole = torch.empty_like(payload.whole)
    gradients = [
        whole.as_strided(g.shape, g.stride(), g.storage_offset() - payload.whole.storage_offset())
        for g in payload.gradients
    ]
    if before is None:
        whole.copy_(elements)
    else:
        before.unpack(gradients, before.parts_of(elements))
    if payload.packing is None:
        return whole
    repacked = torch.empty_like(payload.elements)
    payload.packing.pack(gradients, payload.packing.parts_of(repacked))
    return repacked
