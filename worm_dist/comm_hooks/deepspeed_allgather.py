"""DeepSpeed all-gather: ZeRO's all-gather of updated parameters, without unchanged slices.

After a step in stages 1 and 2 every rank has updated its partition and receives the others'.  A
held slice has the same bits on all ranks before and after, so it need not be sent.  Parameters
with fading slices are sent in full until the fade is over, and vectors always: they are small.

The ranks' live shares of a parameter group differ; how they are sent is described in ``shares``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..groups.freeze_plan import FreezePlan
from .packing import Packing
from .patching import Patch
from .reducer import Reducer
from .shares import Shares

__all__ = ["PackedGather", "ShardsOf"]

ShardsOf: TypeAlias = Callable[[Any, int, int, Tensor], Mapping[Tensor, Any]]
"""A function of ZeRO's optimizer, a parameter group's index, a rank and its flat partition; returns
the shards in it by parameter."""


class PackedGather:
    """Gathers the live parts of one optimizer's partitions.

    Args:
        wrapper: the ``DeepSpeedZeroOptimizer``.
        counter: the reducer whose byte counters are increased.
        shards_of: returns the shards of a rank's partition.
    """

    def __init__(self, wrapper: Any, counter: Reducer, shards_of: ShardsOf) -> None:
        from deepspeed.runtime.zero import stage_1_and_2

        self._wrapper = wrapper
        self._counter = counter
        self._shards_of = shards_of
        self._groups: list[_Group] = []
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        # DeepSpeed calls a function of its module, the same for every engine of the process; so it
        # is patched only while this optimizer steps.
        self._module = stage_1_and_2
        self._step = Patch(wrapper, "step", self._with_gather)
        size = dist.get_world_size(wrapper.dp_process_group)
        weights = sum(flat.nbytes for flat in wrapper.bit16_groups_flat)
        self._dense_bytes = weights // size if size > 1 else 0

    def set_plan(self, plan: FreezePlan, fading_params: Collection[Tensor]) -> None:
        """Use another plan from the next step on; ``fading_params`` are sent in full."""
        numbers = range(len(self._wrapper.bit16_groups_flat))
        self._groups = [
            _Group(self._wrapper, number, plan, fading_params, self._shards_of)
            for number in numbers
        ]
        # Groups are gathered one after the other, so they share a buffer.
        self._buffers.clear()
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for group in self._groups:
            kind = group.dtype_and_device
            sizes[kind] = max(sizes.get(kind, 0), group.num_elements)
        for (dtype, device), size in sizes.items():
            self._buffers[dtype, device] = torch.zeros(size, dtype=dtype, device=device)

    def remove(self) -> None:
        """Restore DeepSpeed's own all-gather."""
        self._groups = []
        self._buffers.clear()
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
            group.gather(self._buffers[group.dtype_and_device])
            self._counter.sent_bytes += group.sent_bytes


class _Group:
    """One parameter group: the live part of every rank's partition.

    Attributes:
        num_elements: number of elements of the buffer that ``gather`` needs.
        sent_bytes: bytes that a rank hands over in ``gather``, averaged over the ranks; comparable
            to the size of a partition.
    """

    def __init__(
        self,
        wrapper: Any,
        number: int,
        plan: FreezePlan,
        fading_params: Collection[Tensor],
        shards_of: ShardsOf,
    ) -> None:
        self._process_group: dist.ProcessGroup = wrapper.real_dp_process_group[number]
        self._rank = dist.get_rank(self._process_group)
        partitions: Sequence[Tensor] = wrapper.parallel_partitioned_bit16_groups[number]
        self._partitions = partitions
        self._packings: list[Packing] = []
        for rank, partition in enumerate(partitions):
            shards = shards_of(wrapper, number, rank, partition)
            values = [shard.value for shard in shards.values()]
            blocks = [
                plan.blocks[p].part(shard.begin, shard.value.numel())
                if p in plan.blocks and p.dim() > 1 and p not in fading_params
                else None
                for p, shard in shards.items()
            ]
            self._packings.append(Packing(blocks, values, partition))
        sizes, size = [p.num_live for p in self._packings], partitions[0].element_size()
        if len(sizes) == 1:
            sizes = [0]  # there is nobody to send to
        self._shares = Shares(sizes, size, self._rank)
        self.num_elements = self._shares.num_elements + self._shares.num_own
        self.sent_bytes = self._shares.num_gathered * size

    @property
    def dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        """Of the buffer that ``gather`` needs."""
        return self._partitions[0].dtype, self._partitions[0].device

    def gather(self, buffer: Tensor) -> None:
        """Send and receive the live parts.  Collective; the layouts follow from the plan, so they
        are the same on all ranks.

        Args:
            buffer: at least ``[num_elements]``; what is in it before and after has no meaning.
        """
        if not self.num_elements:
            return
        of_all, own = buffer[: self.num_elements].tensor_split([self._shares.num_elements])
        self._packings[self._rank].pack(self._partitions[self._rank], own)
        # On a GPU the current stream waits, not the host.
        self._shares.all_gather(own, of_all, self._process_group).wait()
        for rank, share in enumerate(self._shares.of_ranks(of_all)):
            if rank != self._rank:
                self._packings[rank].update(self._partitions[rank], share)
