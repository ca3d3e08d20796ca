"""PowerSGD: low-rank compression of live gradients (arXiv 1905.13727), by torch's own hook.

torch's hook uses only a bucket's buffer, gradients, index and ``is_last``; so it works as well on a
substitute with the live parts.  Its state per bucket has the layout of these parts, and must be
repacked when other channels freeze.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from ..errors import CheckpointError
from ..groups.freeze_plan import FreezePlan
from .allreduce import BucketView, completed
from .callbacks import then
from .packing import Packing
from .powersgd_state import BucketState, blocks_under, pq_sizes, require_fits

__all__ = ["PowerSGD"]

_EXACT_PASSES = 2
"""Passes that are averaged exactly: DDP rebuilds its buckets after the first one, and torch's hook
allows no smaller number."""

_EPSILON = 1e-8
"""Orthogonalisation epsilon, added to the norm that a vector is divided by.  Behind channels that
have all faded a layer's gradient is all zeros; torch's default epsilon of 0 makes NaN of it."""

_REFILL = 1e-7
"""Value of zero elements of Q; see ``_refill_zeros``."""

_SEEDS = 1_000_000_000
"""torch's hook draws a seed below this number whenever it draws Q matrices."""


class PowerSGD:
    """Averages low-rank approximations of gradients, with error feedback.

    Every matrix of live gradients is approximated by a product P Q^T, whose factors are averaged;
    the approximation error is added to the rank's next gradient.  Vectors, and matrices not much
    larger than their factors, are averaged exactly.

    Args:
        process_group: the wrapper's process group.
        rank: number of columns of P and Q.
    """

    def __init__(self, process_group: dist.ProcessGroup, rank: int) -> None:
        self._state = PowerSGDState(
            process_group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=_EXACT_PASSES,
            orthogonalization_epsilon=_EPSILON,
        )
        self._numbers: dict[tuple[int, ...], int] = {}
        self._parameters: dict[int, Sequence[Tensor]] = {}
        self._packings: dict[int, Packing | None] = {}
        self._this_pass: list[int] = []
        self._last_pass: list[int] = []
        self._num_draws = 0
        self._num_passes = 0
        self._saved_buckets: list[BucketState] = []
        self._saved_layout: list[Sequence[Tensor]] = []
        self._by_parameter: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}

    def start(
        self, view: BucketView, finish: Callable[[], Tensor]
    ) -> tuple[torch.futures.Future[Tensor], int]:
        """See ``Averager``; the returned future is already completed.

        torch's hook starts a bucket's later collectives from callbacks.  gloo runs callbacks in
        several threads: with two buckets in flight the ranks would start collectives in different
        orders, and the process aborts.  So a bucket is waited for before the next one.  NCCL runs
        callbacks in the thread that starts the bucket, each on a CUDA stream that has waited for
        the previous collective; waiting then only makes the backward stream wait, which costs
        nothing more, as torch's hook has synchronised the device before.
        """
        state, elements = self._state, view.elements
        number = self._number_of(view)
        self._restore(number, view)
        self._repack(number, view)
        bucket = cast(GradBucket, _LiveBucket(number, view))
        if elements.numel() == 0:
            # The last bucket increments the pass count, also if it has no live element.
            state.maybe_increase_iter(bucket)
            return then(completed(elements), lambda _: finish()), 0

        self._refill_zeros(number)
        exact = state.iter < state.start_powerSGD_iter
        self._num_draws += not exact and number not in state.p_memory_dict
        num_sent_before = state.total_numel_after_compression
        powerSGD_hook(state, bucket).wait()
        num_sent = state.total_numel_after_compression - num_sent_before
        if exact:
            num_sent = elements.numel()  # torch counts compressed passes only
        elif not bool(elements.sum().isfinite()):
            # An overflow, for example by loss scaling, must not stay in the error feedback.  It is
            # in the average, so all ranks reset this bucket.
            state.error_dict.pop(number)
            self._drop_p_and_q(number)
        num_bytes = num_sent * elements.element_size()
        return then(completed(elements), lambda _: finish()), num_bytes

    def _repack(self, number: int, view: BucketView) -> None:
        """Repack a bucket's state if its packing has changed.

        The error feedback of elements that stay live is kept; thawed elements start with zero.  Q
        has another size now and is drawn anew, the same on all ranks.
        """
        before = self._packings.get(number, view.packing)
        self._packings[number] = view.packing
        error_feedback = self._state.error_dict.get(number)
        if before is not view.packing and error_feedback is not None:
            self._state.error_dict[number] = _repacked(error_feedback, before, view)
            self._drop_p_and_q(number)

    # ---- rebuilt buckets and resuming ------------------------------------------------------------

    def state_dict(self, plan: FreezePlan | None, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """See ``Averager``: numbers of passes and of drawn seeds, and for every bucket, in the
        order of the last pass, its parameters, their error feedback and their Q."""
        return {
            "num_passes": self._state.iter,
            "num_draws": self._num_draws,
            "buckets": [
                {
                    "parameters": [names[p] for p in bucket.parameters],
                    "error_feedback": _named(bucket.error_feedback, names),
                    "q": _named(bucket.q, names)
                    if bucket.q is not None and bucket.fits(plan)
                    else None,
                }
                for bucket in self._bucket_states
            ],
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any] | None,
        plan: FreezePlan | None,
        parameters: Mapping[str, Tensor],
    ) -> None:
        assert state is not None and not self._numbers
        rank = self._state.matrix_approximation_rank
        is_complete = state["num_passes"] >= _EXACT_PASSES
        require_fits(state["buckets"], is_complete, plan, parameters, rank)
        if state["num_draws"] > state["num_passes"] * len(parameters):
            raise CheckpointError(
                "load_state_dict: rank.training.reducer.averager.num_draws: more than num_passes "
                "allow"
            )
        self._state.iter = state["num_passes"]
        for _ in range(state["num_draws"]):
            self._draw_seed()
        for bucket in state["buckets"]:
            members = [parameters[name] for name in bucket["parameters"]]
            errors = _unnamed(bucket["error_feedback"], parameters)
            q = None if bucket["q"] is None else _unnamed(bucket["q"], parameters)
            self._saved_buckets.append(BucketState(members, blocks_under(plan, members), errors, q))
        self._saved_layout = [bucket.parameters for bucket in self._saved_buckets]

    def release(self) -> None:
        """See ``Averager``."""
        self._saved_buckets, self._saved_layout = [], []
        self._packings.clear()
        self._by_parameter.clear()
        self._clear_torchs_state()

    @property
    def _bucket_states(self) -> list[BucketState]:
        """The states of all buckets; after a resume those of the saved buckets, until DDP has
        rebuilt its buckets as they were."""
        state, rank = self._state, self._state.matrix_approximation_rank
        if self._saved_buckets or state.iter < state.start_powerSGD_iter:
            return self._saved_buckets
        buckets = [
            BucketState.from_hook(
                self._parameters[number],
                self._packings[number],
                state.error_dict.get(number),
                state.q_memory_dict.get(number),
                rank,
            )
            for number in self._last_pass
        ]
        regrouped = [BucketState.regrouped(buckets, members) for members in self._saved_layout]
        return regrouped or buckets

    def _number_of(self, view: BucketView) -> int:
        """The bucket's number.  A new bucket means that DDP has rebuilt its buckets: then all state
        is split by parameter."""
        number = self._numbers.setdefault(view.bucket, len(self._numbers))
        if number not in self._parameters:
            self._parameters[number] = tuple(view.parameters)
            if not all(p in self._by_parameter for p in view.parameters):
                self._split_by_parameter(view.plan)
        self._this_pass.append(number)
        if view.is_last:
            self._last_pass, self._this_pass = self._this_pass, []
            self._num_passes += 1
            if self._num_passes == _EXACT_PASSES:
                self._saved_layout = []  # DDP rebuilds its buckets only once
        return number

    def _split_by_parameter(self, plan: FreezePlan | None) -> None:
        """Move the state of all buckets to ``_by_parameter``: error feedback and Q."""
        state = self._state
        for bucket in self._bucket_states:
            q = bucket.q if bucket.fits(plan) else None
            if q is None and self._saved_layout and bucket.num_live(plan):
                q = bucket.draw_q(plan, state.matrix_approximation_rank, self._draw_seed())
            for p in bucket.parameters:
                self._by_parameter[p] = bucket.error_feedback.get(p), None if q is None else q[p]
        self._saved_buckets = []
        self._clear_torchs_state()

    def _clear_torchs_state(self) -> None:
        state = self._state
        for by_number in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            by_number.clear()

    def _draw_seed(self) -> int:
        self._num_draws += 1
        return int(self._state.rng.randint(_SEEDS))

    def _restore(self, number: int, view: BucketView) -> None:
        """Restore this bucket's state from ``_by_parameter``, in the bucket's layout."""
        state = self._state
        if not self._by_parameter or view.parameters[0] not in self._by_parameter:
            return
        errors, qs = zip(*(self._by_parameter.pop(p) for p in view.parameters))
        self._packings[number] = view.packing
        if view.elements.numel() == 0:
            return
        if any(error is not None for error in errors):
            full = torch.zeros_like(view.full)
            for part, error in zip(_like_gradients(full, view), errors, strict=True):
                if error is not None:
                    part.copy_(error)
            packed = full
            if view.packing is not None:
                packed = torch.empty_like(view.elements)
                view.packing.pack(full, packed)
            state.error_dict[number] = packed
        if any(q is not None for q in qs):
            state.q_memory_dict[number] = torch.cat([q for q in qs if q is not None]).to(
                view.elements
            )
            # P is computed anew in every pass; only its size matters.
            rank = state.matrix_approximation_rank
            size = sum(pq_sizes(part.shape, rank)[0] for part in view.parts)
            state.p_memory_dict[number] = view.elements.new_empty(size)

    def _drop_p_and_q(self, number: int) -> None:
        self._state.p_memory_dict.pop(number, None)
        self._state.q_memory_dict.pop(number, None)

    def _refill_zeros(self, number: int) -> None:
        """Replace zeros in a bucket's Q by a tiny value, the same on all ranks.

        A gradient of zeros in one pass gives a Q of zeros, which would approximate every later
        gradient by zeros.  Beside other values the tiny value is lost in rounding.
        """
        q = self._state.q_memory_dict.get(number)
        if q is not None:
            q.masked_fill_(q == 0, _REFILL)


class _LiveBucket:
    """The part of GradBucket's interface that torch's hook uses, for the live elements."""

    def __init__(self, number: int, view: BucketView) -> None:
        self._number = number
        self._view = view

    def index(self) -> int:
        """The key of the hook's state.  It identifies the bucket's parameters; DDP's own index
        means another bucket after a rebuild."""
        return self._number

    def is_last(self) -> bool:
        return self._view.is_last

    def buffer(self) -> Tensor:
        return self._view.elements

    def gradients(self) -> list[Tensor]:
        # Scalars as vectors: the hook views every gradient as a matrix of shape[0] rows.
        parts = (part for part in self._view.parts if part.numel() > 0)
        return [part if part.dim() > 0 else part.view(1) for part in parts]


def _repacked(elements: Tensor, before: Packing | None, view: BucketView) -> Tensor:
    """Convert elements from the packing ``before`` to the view's; new elements are zero."""
    full = torch.empty_like(view.full)
    if before is None:
        full.copy_(elements)
    else:
        before.unpack(full, elements)
    if view.packing is None:
        return full
    repacked = torch.empty_like(view.elements)
    view.packing.pack(full, repacked)
    return repacked


def _like_gradients(full: Tensor, view: BucketView) -> list[Tensor]:
    """Views of a tensor of the bucket's size, laid out like the bucket's gradients."""
    return [
        full.as_strided(g.shape, g.stride(), g.storage_offset() - view.full.storage_offset())
        for g in view.gradients
    ]


def _named(tensors: Mapping[Tensor, Tensor], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    return {names[p]: tensor for p, tensor in tensors.items()}


def _unnamed(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[Tensor, Tensor]:
    return {parameters[n]: t.to(parameters[n].device) for n, t in tensors.items()}
