"""Gather: ZeRO's parameter all-gather, without what has not changed.

After a step in stages 1 and 2 every rank has moved its partition and is told the others'.  A slice
that is held has the same bits on all ranks before and after, so it need not be told.  Parameters of
which something fades are told whole until that is over, and vectors always: together they are next
to nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..backends.deepspeed_optimizer import partition_shards
from ..backends.patching import Patch
from ..groups.freeze_plan import FreezePlan
from .packing import Packing
from .reducer import Reducer

__all__ = ["PackedGather"]


class PackedGather:
    """Gathers the live part of one optimizer's partitions.

    Args:
        wrapper: a ``DeepSpeedZeroOptimizer``.
        counter: counts the bytes that this rank hands over.
    """

    def __init__(self, wrapper: Any, counter: Reducer) -> None:
        from deepspeed.runtime.zero import stage_1_and_2

        self._wrapper = wrapper
        self._counter = counter
        self._groups: list[_Group] = []
        # DeepSpeed calls a function of its module, the same one for every engine of the process.
        # It is taken while this optimizer steps and at no other time.
        self._module = stage_1_and_2
        self._step = Patch(wrapper, "step", self._with_gather)
        size = dist.get_world_size(wrapper.dp_process_group)
        weights = sum(flat.nbytes for flat in wrapper.bit16_groups_flat)
        self._dense_bytes = weights // size if size > 1 else 0

    def adopt(self, plan: FreezePlan, moving: Collection[Tensor] = ()) -> None:
        """Gather by another plan from the next step on; what is ``moving`` is told whole."""
        numbers = range(len(self._wrapper.bit16_groups_flat))
        self._groups = [_Group(self._wrapper, number, plan, moving) for number in numbers]

    def remove(self) -> None:
        """Leave the gathering to DeepSpeed."""
        self._groups = []
        self._step.remove()

    def _with_gather(self, *arguments: Any, **keywords: Any) -> Any:
        taken = Patch(self._module, "all_gather_dp_groups", lambda **k: self._gather(taken, k))
        try:
            return self._step.original(*arguments, **keywords)
        finally:
            taken.remove()

    def _gather(self, taken: Patch, keywords: dict[str, Any]) -> None:
        self._counter.dense_bytes += self._dense_bytes
        if not self._groups:
            self._counter.sent_bytes += self._dense_bytes
            taken.original(**keywords)
        for group in self._groups:
            group.gather()
            self._counter.sent_bytes += group.sent_bytes


class _Group:
    """One parameter group: the live part of each rank's partition."""

    def __init__(
        self, wrapper: Any, number: int, plan: FreezePlan, moving: Collection[Tensor]
    ) -> None:
        self._process_group: dist.ProcessGroup = wrapper.real_dp_process_group[number]
        self._rank = dist.get_rank(self._process_group)
        partitions: Sequence[Tensor] = wrapper.parallel_partitioned_bit16_groups[number]
        self._values: list[list[Tensor]] = []
        self._packings: list[Packing] = []
        for rank, partition in enumerate(partitions):
            shards = partition_shards(wrapper, number, rank, partition)
            values = [shard.value for shard in shards.values()]
            blocks = [
                plan.blocks[p].part(shard.begin, shard.value.numel())
                if p in plan.blocks and p.dim() > 1 and p not in moving
                else None
                for p, shard in shards.items()
            ]
            shapes = [value.shape for value in values]
            self._packings.append(Packing(blocks, shapes, partition.dtype, partition.device))
            self._values.append(values)
        # A rank's share of what all of them tell, as a partition is of the whole.
        told = sum(packing.num_live for packing in self._packings) * partitions[0].element_size()
        self.sent_bytes = told // len(partitions) if len(partitions) > 1 else 0

    def gather(self) -> None:
        """Collective; the layouts follow from the plan, so all ranks have the same.

        Each rank broadcasts what lives of its partition.  An all-gather wants parts of one size,
        and the longest may well be a layer of which nothing is frozen; padded to that, most of
        what was saved would be sent after all.
        """
        if len(self._packings) == 1:
            return
        self._packings[self._rank].pack(self._values[self._rank])
        works = [
            dist.broadcast(packing.buffer, group=self._process_group, group_src=rank, async_op=True)
            for rank, packing in enumerate(self._packings)
            if packing.num_live
        ]
        for work in works:
            assert work is not None
            work.wait()  # on a GPU, the stream that writes the parts back waits, not the host
        for rank, packing in enumerate(self._packings):
            if rank != self._rank:
                packing.update(self._values[rank], packing.parts)
