"""Low rank: PowerSGD of what lives (arXiv 1905.13727), by torch's own hook.

torch's hook asks a bucket for its buffer, its gradients, its number and whether it is the last one,
and for nothing else; so it works as well on a stand-in that has the live parts.  What it remembers
of a bucket lies as these parts do, and has to follow when other channels freeze.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from ..groups.freeze_plan import FreezePlan
from .allreduce import BucketView, completed
from .packing import Packing
from .powersgd_state import Memory, blocks_under, thin_sizes

__all__ = ["PowerSGD"]

_EXACT_PASSES = 2
"""DDP arranges its buckets anew after the first pass, and torch's hook begins no sooner than here;
until then it averages everything exactly."""

_TINY = 1e-8
"""Added to the length of a vector before the vector is divided by it.  A layer behind channels that
have all faded has a gradient of zeros only; torch's default adds nothing, and makes NaN of it."""

_SPARK = 1e-7

_SEEDS = 1_000_000_000
"""torch's hook draws a seed below this wherever it draws thin matrices."""


class PowerSGD:
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
        self._parameters: dict[int, Sequence[Tensor]] = {}
        self._packings: dict[int, Packing | None] = {}
        self._this_pass: list[int] = []
        self._last_pass: list[int] = []
        self._num_draws = 0
        self._num_passes = 0
        self._loaded: list[Memory] = []
        self._layout: list[Sequence[Tensor]] = []
        self._apart: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}

    def start(self, payload: BucketView) -> tuple[torch.futures.Future[None], int]:
        """See ``Averaging``; the future is done already.

        The later collectives of a bucket start from callbacks.  gloo runs these in several threads,
        so that with two buckets in flight the ranks would start them in different orders, and the
        process aborts: one bucket has to wait for the other.  NCCL runs them at once, in the thread
        that starts the bucket, each on a CUDA stream that has waited for the collective before it;
        to wait then means that the stream of the backward pass waits too, which costs nothing more:
        torch's hook has synchronised the device by then.
        """
        state, elements = self._state, payload.elements
        number = self._number_of(payload)
        self._recall(number, payload)
        self._follow(number, payload)
        bucket = cast(GradBucket, _LiveBucket(number, payload))
        if elements.numel() == 0:
            # The last bucket of a pass counts the passes, also if nothing lives in it.
            state.maybe_increase_iter(bucket)
            return completed(elements), 0

        self._rekindle(number)
        exact = state.iter < state.start_powerSGD_iter
        self._num_draws += not exact and number not in state.p_memory_dict
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

    def _follow(self, number: int, payload: BucketView) -> None:
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

    # ---- other buckets, and a restart ------------------------------------------------------------

    def remembered(self, plan: FreezePlan | None, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """See ``Averaging``: passes and draws so far, and of every bucket, in the order of the last
        pass, its parameters, what was left out of their gradients and their thin matrices."""
        return {
            "passes": self._state.iter,
            "draws": self._num_draws,
            "buckets": [
                {
                    "parameters": [names[p] for p in memory.parameters],
                    "left_out": _named(memory.left_out, names),
                    "thin": _named(memory.thin, names)
                    if memory.thin is not None and memory.fits(plan)
                    else None,
                }
                for memory in self._memories
            ],
        }

    def remember(
        self,
        state: Mapping[str, Any] | None,
        plan: FreezePlan | None,
        parameters: Mapping[str, Tensor],
    ) -> None:
        assert state is not None and not self._numbers
        self._state.iter = state["passes"]
        for _ in range(state["draws"]):
            self._draw_seed()
        for bucket in state["buckets"]:
            here = [parameters[name] for name in bucket["parameters"]]
            left_out = _unnamed(bucket["left_out"], parameters)
            thin = None if bucket["thin"] is None else _unnamed(bucket["thin"], parameters)
            self._loaded.append(Memory(here, blocks_under(plan, here), left_out, thin))
        self._layout = [memory.parameters for memory in self._loaded]

    @property
    def _memories(self) -> list[Memory]:
        """Of all buckets; after a restart of those that there were before, until DDP has come to
        the same ones again."""
        state, rank = self._state, self._state.matrix_approximation_rank
        if self._loaded or state.iter < state.start_powerSGD_iter:
            return self._loaded
        memories = [
            Memory.of(
                self._parameters[number],
                self._packings[number],
                state.error_dict.get(number),
                state.q_memory_dict.get(number),
                rank,
            )
            for number in self._last_pass
        ]
        arranged = [Memory.arranged(memories, parameters) for parameters in self._layout]
        return arranged or memories

    def _number_of(self, payload: BucketView) -> int:
        """The bucket's number.  If it is a new one, DDP has arranged its buckets anew, and all that
        is remembered is taken apart."""
        number = self._numbers.setdefault(payload.bucket, len(self._numbers))
        if number not in self._parameters:
            self._parameters[number] = tuple(payload.parameters)
            if not all(p in self._apart for p in payload.parameters):
                self._take_apart(payload.plan)
        self._this_pass.append(number)
        if payload.is_last:
            self._last_pass, self._this_pass = self._this_pass, []
            self._num_passes += 1
            if self._num_passes == _EXACT_PASSES:
                self._layout = []  # DDP will not arrange its buckets again
        return number

    def _take_apart(self, plan: FreezePlan | None) -> None:
        state = self._state
        for memory in self._memories:
            thin = memory.thin if memory.fits(plan) else None
            if thin is None and self._layout and memory.num_live(plan):
                thin = memory.drawn(plan, state.matrix_approximation_rank, self._draw_seed())
            for p in memory.parameters:
                self._apart[p] = memory.left_out.get(p), None if thin is None else thin[p]
        self._loaded = []
        for remembered in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            remembered.clear()

    def _draw_seed(self) -> int:
        self._num_draws += 1
        return int(self._state.rng.randint(_SEEDS))

    def _recall(self, number: int, payload: BucketView) -> None:
        """Put together what was taken apart, as it lies in this bucket."""
        state = self._state
        if not self._apart or payload.parameters[0] not in self._apart:
            return
        left_out, thin = zip(*(self._apart.pop(p) for p in payload.parameters))
        self._packings[number] = payload.packing
        if payload.elements.numel() == 0:
            return
        if any(one is not None for one in left_out):
            packed = torch.zeros_like(payload.elements)
            zeros = (torch.zeros_like(g) for g in payload.gradients)
            whole = [zero if one is None else one for one, zero in zip(left_out, zeros)]
            if payload.packing is not None:
                payload.packing.pack(whole, payload.packing.parts_of(packed))
            else:
                for place, one in zip(_like_gradients(packed, payload), whole, strict=True):
                    place.copy_(one)
            state.error_dict[number] = packed
        if any(row is not None for row in thin):
            rows = [row for row in thin if row is not None]
            state.q_memory_dict[number] = torch.cat(rows).to(payload.elements)
            # The first of two thin matrices is computed anew in every pass.
            rank = state.matrix_approximation_rank
            size = sum(thin_sizes(part.shape, rank)[0] for part in payload.parts)
            state.p_memory_dict[number] = payload.elements.new_empty(size)

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

    def __init__(self, number: int, payload: BucketView) -> None:
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


def _repacked(elements: Tensor, before: Packing | None, payload: BucketView) -> Tensor:
    """Elements that were packed as ``before``, packed as the payload is; zero if not among them."""
    whole = torch.empty_like(payload.whole)
    gradients = _like_gradients(whole, payload)
    if before is None:
        whole.copy_(elements)
    else:
        before.unpack(gradients, before.parts_of(elements))
    if payload.packing is None:
        return whole
    repacked = torch.empty_like(payload.elements)
    payload.packing.pack(gradients, payload.packing.parts_of(repacked))
    return repacked


def _like_gradients(whole: Tensor, payload: BucketView) -> list[Tensor]:
    """Views of a tensor as large as the bucket, as the bucket's gradients are views of it."""
    return [
        whole.as_strided(g.shape, g.stride(), g.storage_offset() - payload.whole.storage_offset())
        for g in payload.gradients
    ]


def _named(tensors: Mapping[Tensor, Tensor], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    return {names[p]: tensor for p, tensor in tensors.items()}


def _unnamed(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[Tensor, Tensor]:
    return {parameters[n]: t.to(parameters[n].device) for n, t in tensors.items()}
