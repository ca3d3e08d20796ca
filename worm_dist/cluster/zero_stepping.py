"""ZeRO stepping: where DeepSpeed's optimizers keep what they step.

They step copies in full precision.  In stage 0 these are whole; in stages 1 and 2 the copies of a
parameter group lie in a row, and each rank has, and steps, one stretch of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .override import Override
from .stepping import Handle, Owners, Shard, Stepping

__all__ = ["CopyStepping", "PartitionStepping", "partition_shards"]


class CopyStepping(Stepping):
    """DeepSpeed's ``FP16_UnfusedOptimizer``: every rank steps a copy of every parameter."""

    copies = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.optimizer)
        self._copies: Mapping[Tensor, Tensor] = {
            parameter: copy
            for parameters, copies in zip(wrapper.fp16_groups, wrapper.fp32_groups)
            for parameter, copy in zip(parameters, copies, strict=True)
        }

        self._groups: Sequence[Sequence[Tensor]] = wrapper.fp16_groups

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        return self._groups

    def owner(self, parameter: Tensor) -> Tensor:
        return self._copies[parameter]

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        copy = self._copies[parameter]
        return (Shard(copy, 0, copy, 0),)


class PartitionStepping(Stepping):
    """DeepSpeed's ``DeepSpeedZeroOptimizer``: every rank steps its partition of every group."""

    copies = True
    shared = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.optimizer)
        self._wrapper = wrapper
        self._shards: dict[Tensor, Shard] = {}
        self._owners: dict[Tensor, Tensor] = {}
        for number, owner in enumerate(wrapper.single_partition_of_fp32_groups):
            rank = dist.get_rank(wrapper.real_dp_process_group[number])
            self._shards |= partition_shards(wrapper, number, rank, owner)
            self._owners |= dict.fromkeys(wrapper.bit16_groups[number], owner)

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        groups: Sequence[Sequence[Tensor]] = self._wrapper.bit16_groups
        return groups

    def owner(self, parameter: Tensor) -> Tensor:
        return self._owners[parameter]

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        return (self._shards[parameter],) if parameter in self._shards else ()

    def listen(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        """The torch optimizer is called once for every group, and the group is copied back before
        the next one's turn."""

        def step(*arguments: Any, **keywords: Any) -> Any:
            before()
            result = override.original(*arguments, **keywords)
            if not self._wrapper.overflow:
                after()
            return result

        def stepped(*_: object) -> None:
            hold({p for group in self.optimizer.param_groups for p in group["params"]})

        override = Override(self._wrapper, "step", step)
        return [override, self.optimizer.register_step_post_hook(stepped)]


def partition_shards(wrapper: Any, number: int, rank: int, owner: Tensor) -> dict[Tensor, Shard]:
    """What lies in one rank's partition of a parameter group.

    Args:
        wrapper: a ``DeepSpeedZeroOptimizer``.
        number: of the group.
        rank: whose partition.
        owner: ``[elements of a partition]``, that the shards are parts of.
    """
    begin = rank * wrapper.partition_size[number]
    end = begin + owner.numel()
    flat = wrapper.bit16_groups_flat[number]
    shards = {}
    # DeepSpeed's own offsets: there may be padding between parameters.
    parameters = wrapper.round_robin_bit16_groups[number]
    offsets = wrapper.round_robin_bit16_offsets[number]
    for parameter, offset in zip(parameters, offsets, strict=True):
        assert parameter.data_ptr() == flat.data_ptr() + offset * flat.element_size()
        first, last = max(offset, begin), min(offset + parameter.numel(), end)
        if first < last:
            value = owner.detach()[first - begin : last - begin]
            if value.numel() == parameter.numel():
                value = value.view(parameter.shape)
            shards[parameter] = Shard(value, first - offset, owner, first - begin)
    return shards
