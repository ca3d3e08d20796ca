"""DDP: the communication hook that leaves frozen slices out of the gradient all-reduce.

The convention is torch's own: a state object and a function of state and bucket.
"""

# No postponed annotations here: torch reads the hook's, and wants classes, not strings.
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from ..backends.ddp import OwnHookState
from ..groups.freeze_plan import FreezePlan
from .allreduce import Averager, BucketView, completed
from .packing import Packing, as_it_lies
from .reducer import Reducer

__all__ = ["PackedReducer", "packed_allreduce"]


class PackedReducer(Reducer, OwnHookState):
    """State of the hook.

    Args:
        averaging: how the ranks average what lives.
        process_group: that of the wrapper.
    """

    def __init__(self, averaging: Averager, process_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.averaging = averaging
        self.process_group = process_group
        self._packings: dict[tuple[int, ...], Packing | None] = {}

    def adopt(
        self, plan: FreezePlan, held: FreezePlan | None = None, moving: Collection[Tensor] = ()
    ) -> None:
        super().adopt(plan, held, moving)
        self._packings.clear()

    def remove(self) -> None:
        super().remove()
        self._packings.clear()

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        remembered = self.averaging.remembered(self.plan, names)
        return {**super().state_dict(names), "averaging": remembered}

    def load_state_dict(self, state: Mapping[str, Any], network: nn.Module) -> None:
        super().load_state_dict(state, network)
        self.averaging.remember(state["averaging"], self.plan, dict(network.named_parameters()))

    def payload(self, bucket: GradBucket) -> BucketView:
        """A bucket as it will be sent; its live gradients are packed."""
        parameters, whole, parts = bucket.parameters(), bucket.buffer(), bucket.gradients()
        # DDP rebuilds its buckets after the first pass, so neither the index of a bucket nor its
        # number of parameters says which bucket it is; its parameters do.
        key = tuple(map(id, parameters))
        packing = self._packing(key, parameters, whole)
        payload = BucketView(
            bucket=key,
            is_last=bucket.is_last(),
            plan=self.plan,
            parameters=parameters,
            whole=whole,
            gradients=[as_it_lies(p, part) for p, part in zip(parameters, parts, strict=True)],
            packing=packing,
            elements=whole if packing is None else packing.buffer,
            parts=parts if packing is None else packing.parts,
        )
        if packing is not None:
            packing.pack(payload.gradients)
        return payload

    def _packing(
        self, key: tuple[int, ...], parameters: Sequence[Tensor], whole: Tensor
    ) -> Packing | None:
        """How to pack a bucket; None if all of it lives."""
        if key not in self._packings:
            self._packings[key] = None
            if self.plan is not None and not self.plan.blocks.keys().isdisjoint(parameters):
                blocks = [self.plan.blocks.get(parameter) for parameter in parameters]
                shapes = [parameter.shape for parameter in parameters]
                self._packings[key] = Packing(blocks, shapes, whole.dtype, whole.device)
        return self._packings[key]


def packed_allreduce(state: PackedReducer, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average the live slices of a bucket over the ranks; frozen slices become zero.

    Without compression bit-equal to averaging the whole bucket with the frozen slices set to zero,
    on two ranks; on more, the ring may add in another order.

    The buffer is reused every step.  That is safe on CUDA streams too: DDP makes the backward
    stream wait for every bucket's future before ``backward`` returns, so the next step's ``pack``
    is ordered behind this step's ``unpack``; and a callback of ``then`` runs on a stream that has
    waited for the collective, so ``unpack`` is ordered behind it.

    (torch looks the second parameter up by its name; it must be ``bucket``.)
    """
    if state.rests:
        return completed(bucket.buffer()).then(lambda _: bucket.buffer())
    if bucket.buffer().is_sparse:
        return _sparse_allreduce(state, bucket.buffer())
    payload = state.payload(bucket)
    state.probe_bucket(zip(bucket.parameters(), payload.gradients))
    averaged, sent_bytes = state.averaging.start(payload)
    state.sent_bytes += sent_bytes
    state.dense_bytes += payload.whole.numel() * payload.whole.element_size()

    def unpacked(averaged: torch.futures.Future[None]) -> Tensor:
        averaged.value()  # raises what went wrong
        if payload.packing is not None:
            payload.packing.unpack(payload.gradients)
        return payload.whole

    return averaged.then(unpacked)


def _sparse_allreduce(state: PackedReducer, gradient: Tensor) -> torch.futures.Future[Tensor]:
    """Average a sparse gradient as DDP does without a hook: it has a bucket to itself, and no
    channel group has a part of it."""
    gradient.div_(dist.get_world_size(state.process_group))
    num_bytes = gradient._indices().nbytes + gradient._values().nbytes
    state.sent_bytes += num_bytes
    state.dense_bytes += num_bytes
    work = dist.all_reduce(gradient, group=state.process_group, async_op=True)
    reduced: torch.futures.Future[list[Tensor]] = work.get_future()
    return reduced.then(lambda reduced: reduced.value()[0])
