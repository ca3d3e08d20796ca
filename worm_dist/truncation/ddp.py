"""DDP: the communication hook that leaves frozen slices out of the gradient all-reduce.

The convention is torch's own: a state object and a function of state and bucket.
"""

# No postponed annotations here: torch reads the hook's, and wants classes, not strings.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from ..cluster.wrap import OwnState
from .packing import Packing
from .plan import Block, Plan

__all__ = ["PackedReduction", "packed_allreduce"]


@dataclass
class PackedReduction(OwnState):
    """State of the hook.

    Attributes:
        process_group: that of the wrapper.
        wire_dtype: what live gradients are rounded to for the all-reduce; None leaves them as
            they are.
        plan: which slices live in the generation in force; None sends everything.
        heard: float ``[1]`` on the gradients' device, above zero once a slice that was listened to
            had a gradient; None while nothing is listened to.
        num_buckets_heard: buckets listened to so far.
        sent_bytes, dense_bytes: bytes handed to the all-reduce, and bytes that would have been
            if everything lived and nothing were rounded, since ``take_bytes``.
    """

    process_group: dist.ProcessGroup
    wire_dtype: torch.dtype | None = None
    plan: Plan | None = None
    heard: Tensor | None = None
    num_buckets_heard: int = 0
    sent_bytes: int = 0
    dense_bytes: int = 0

    def __post_init__(self) -> None:
        self._packings: dict[tuple[int, ...], Packing | None] = {}
        self._wires: dict[tuple[int, ...], Tensor] = {}
        self._listened: Mapping[Tensor, Block] = {}

    def adopt(self, plan: Plan) -> None:
        """Pack by another plan from the next backward pass on; the old buffers are dropped."""
        self.plan = plan
        self.heard = None
        self._packings.clear()
        self._wires.clear()

    def listen(self, plan: Plan, device: torch.device) -> None:
        """Note in the next backward passes whether a slice that this plan freezes has a gradient
        on this rank."""
        self._listened = plan.blocks
        self.heard = torch.zeros(1, device=device)
        self.num_buckets_heard = 0

    def note(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Listen to one bucket's gradients, before they are averaged.  Synchronises nothing."""
        if self.heard is None:
            return
        self.num_buckets_heard += 1
        for parameter, gradient in zip(parameters, gradients, strict=True):
            block = self._listened.get(parameter)
            for dim, frozen in block.frozen.items() if block is not None else ():
                # NaN is not zero either.
                self.heard += (gradient.index_select(dim, frozen) != 0).any()

    def take_bytes(self) -> tuple[int, int]:
        """Bytes sent, and bytes of a dense step, since the last call."""
        taken = self.sent_bytes, self.dense_bytes
        self.sent_bytes = self.dense_bytes = 0
        return taken

    def remove(self) -> None:
        """Send everything from now on, as DDP does without a hook."""
        self.plan = None
        self._packings.clear()
        self._wires.clear()

    def packing(self, bucket: GradBucket) -> Packing | None:
        """How to pack a bucket; None if all of it lives."""
        parameters = bucket.parameters()
        key = _key(bucket)
        if key not in self._packings:
            self._packings[key] = None
            if self.plan is not None and not self.plan.blocks.keys().isdisjoint(parameters):
                buffer = bucket.buffer()
                self._packings[key] = Packing(parameters, self.plan, buffer.dtype, buffer.device)
        return self._packings[key]

    def wire(self, bucket: GradBucket, payload: Tensor) -> Tensor:
        """The payload as it is sent: itself, or rounded into a buffer kept for the generation."""
        if self.wire_dtype is None or self.wire_dtype == payload.dtype:
            return payload
        key = _key(bucket)
        if key not in self._wires:
            self._wires[key] = torch.empty_like(payload, dtype=self.wire_dtype)
        return self._wires[key].copy_(payload)


def _key(bucket: GradBucket) -> tuple[int, ...]:
    """DDP rebuilds its buckets after the first pass, so neither the index of a bucket nor its
    number of parameters says which bucket it is; its parameters do."""
    return tuple(map(id, bucket.parameters()))


def packed_allreduce(state: PackedReduction, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average the live slices of a bucket over the ranks; frozen slices become zero.

    Bit-equal to averaging the whole bucket with the frozen slices set to zero, on two ranks; on
    more, the ring may add in another order.

    The buffer is reused every step.  That is safe on CUDA streams too: DDP makes the backward
    stream wait for every bucket's future before ``backward`` returns, so the next step's ``pack``
    is ordered behind this step's ``unpack``; and a callback of ``then`` runs on a stream that has
    waited for the collective, so ``unpack`` is ordered behind it.

    (torch looks the second parameter up by its name; it must be ``bucket``.)
    """
    whole = bucket.buffer()
    packing = state.packing(bucket)
    gradients = bucket.gradients()
    state.note(bucket.parameters(), gradients)
    payload = whole if packing is None else packing.buffer
    if packing is not None:
        packing.pack(gradients)
    state.dense_bytes += whole.numel() * whole.element_size()
    if payload.numel() == 0:
        # Nothing lives in this bucket, on any rank: the plan is the same on all.
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(whole.zero_())
        return done

    # Scaled before the sum, by multiplication, as DDP itself does without a hook.
    payload.mul_(1 / dist.get_world_size(state.process_group))
    wire = state.wire(bucket, payload)
    state.sent_bytes += wire.numel() * wire.element_size()
    work = dist.all_reduce(wire, group=state.process_group, async_op=True)
    reduced: torch.futures.Future[list[Tensor]] = work.get_future()

    def unpacked(_: torch.futures.Future[list[Tensor]]) -> Tensor:
        if wire is not payload:
            payload.copy_(wire)
        if packing is not None:
            packing.unpack(gradients)
        return whole

    return reduced.then(unpacked)
