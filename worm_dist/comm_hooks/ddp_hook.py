"""DDP hook: the communication hook that leaves frozen slices out of the gradient all-reduce.

As in torch's own hooks there is a state object and a function of state and bucket.
"""

# No postponed annotations here: torch checks the hook's annotations, and expects classes.
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from ..groups.freeze_plan import FreezePlan
from .allreduce import Averager, BucketView, completed
from .callbacks import forget_finished, then
from .checksums import Checksums
from .packing import Packing, with_parameter_strides
from .reducer import Reducer

__all__ = ["PackedReducer", "packed_allreduce"]


class PackedReducer(Reducer):
    """The communication hook's state.

    Args:
        averager: averages the live elements over the ranks.
        process_group: the wrapper's process group.
        checksums: what compares the sums of packed buckets, if the averager sends them.
    """

    def __init__(
        self,
        averager: Averager,
        process_group: dist.ProcessGroup,
        checksums: Checksums | None = None,
    ) -> None:
        super().__init__()
        self.checksums = checksums
        self.averager = averager
        self.process_group = process_group
        self._packings: dict[tuple[int, ...], Packing | None] = {}

    def _follow(self, plan: FreezePlan, held: FreezePlan, fading: Collection[Tensor]) -> None:
        self._packings.clear()

    def remove(self) -> None:
        super().remove()
        self._packings.clear()
        forget_finished()
        self.averager.release()  # a variable of the user's may keep the wrapper, and so this hook

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        averager = self.averager.state_dict(self.plan, names)
        return {**super().state_dict(names), "averager": averager}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state, parameters)
        self.averager.load_state_dict(state["averager"], self.plan, parameters)

    def bucket_view(self, bucket: GradBucket) -> BucketView:
        """The view of a bucket, with its live elements packed."""
        parameters, full = bucket.parameters(), bucket.buffer()
        # DDP rebuilds its buckets after the first pass, so neither a bucket's index nor its number
        # of parameters identifies it; its parameters do.
        key = tuple(map(id, parameters))
        packing = self._packing(key, bucket)
        view = BucketView(
            bucket=key,
            is_last=bucket.is_last(),
            plan=self.plan,
            parameters=parameters,
            full=full,
            rows=bucket.gradients,
            packing=packing,
            elements=full if packing is None else packing.buffer,
        )
        if packing is not None:
            packing.pack(full)
        return view

    def _packing(self, key: tuple[int, ...], bucket: GradBucket) -> Packing | None:
        """The packing of a bucket, cached; None if all of it is live."""
        if key not in self._packings:
            self._packings[key] = None
            parameters = bucket.parameters()
            if self.plan is not None and not self.plan.blocks.keys().isdisjoint(parameters):
                blocks = [self.plan.blocks.get(parameter) for parameter in parameters]
                gradients = map(with_parameter_strides, parameters, bucket.gradients())
                self._packings[key] = Packing(blocks, list(gradients), bucket.buffer())
        return self._packings[key]


def packed_allreduce(state: PackedReducer, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average the live slices of a bucket over the ranks; frozen slices become zero.

    Without compression and on two ranks, bit-equal to averaging the full bucket with the frozen
    slices set to zero; on more ranks the ring may add in another order.

    The buffer is reused every step.  That is safe on CUDA streams too: DDP makes the backward
    stream wait for every bucket's future before ``backward`` returns, so the next step's ``pack``
    is ordered after this step's ``unpack``; and a callback of ``then`` runs on a stream that has
    waited for the collective, so ``unpack`` is ordered after it.

    (torch requires the second parameter to be named ``bucket``.)
    """
    if state.paused:
        return completed(bucket.buffer()).then(lambda _: bucket.buffer())
    if bucket.buffer().is_sparse:
        return _sparse_allreduce(state, bucket.buffer())
    view = state.bucket_view(bucket)
    if state.nonzero_seen is not None:
        state.probe_bucket(zip(view.parameters, view.gradients))

    def unpacked() -> Tensor:
        if view.packing is not None:
            view.packing.unpack(view.full)
        return view.full

    averaged, sent_bytes = state.averager.start(view, unpacked)
    state.sent_bytes += sent_bytes
    state.dense_bytes += view.full.numel() * view.full.element_size()
    return averaged


def _sparse_allreduce(state: PackedReducer, gradient: Tensor) -> torch.futures.Future[Tensor]:
    """Average a sparse gradient as DDP does without a hook: it is the only one in its bucket, and
    in no channel group."""
    gradient.div_(dist.get_world_size(state.process_group))
    num_bytes = gradient._indices().nbytes + gradient._values().nbytes
    state.sent_bytes += num_bytes
    state.dense_bytes += num_bytes
    work = dist.all_reduce(gradient, group=state.process_group, async_op=True)
    reduced: torch.futures.Future[list[Tensor]] = work.get_future()
    return then(reduced, lambda reduced: reduced.value()[0], work=work)
