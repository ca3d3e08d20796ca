"""ZeRO stepping: where DeepSpeed's optimizers keep what they step.

They step copies in full precision.  In stage 0 these are whole; in stages 1 and 2 the copies of a
parameter group lie in a row, and each rank has, and steps, one stretch of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .optimizer_view import Handle, OptimizerView, Owners, Shard
from .patching import Patch

__all__ = ["CopyingOptimizerView", "PartitionedOptimizerView", "partition_shards"]


class _WrappedOptimizerView(OptimizerView):
    """The torch optimizer in a wrapper of DeepSpeed's, which may skip a step, or step once for
    each of its groups, or step to see whether it can."""

    copies = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.optimizer)
        self._wrapper = wrapper

    def listen(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            before()
            result = override.original(*arguments, **keywords)
            if not self._wrapper.overflow:
                after()
            return result

        override = Patch(self._wrapper, "step", step)
        moved = self.optimizer.register_step_post_hook(lambda *_: hold(self._moved()))
        return [override, moved]

    def _moved(self) -> Owners:
        """What the torch optimizer has just stepped."""
        return None


class CopyingOptimizerView(_WrappedOptimizerView):
    """DeepSpeed's ``FP16_UnfusedOptimizer``: every rank steps a copy of every parameter."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._groups: Sequence[Sequence[Tensor]] = wrapper.fp16_groups
        self._copies: Mapping[Tensor, Tensor] = {
            parameter: copy
            for parameters, copies in zip(wrapper.fp16_groups, wrapper.fp32_groups)
            for parameter, copy in zip(parameters, copies, strict=True)
        }

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        return self._groups

    def owner(self, parameter: Tensor) -> Tensor:
        return self._copies[parameter]

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        stepped = self._copies.get(parameter, parameter)
        return (Shard(stepped, 0, stepped, 0),)


class PartitionedOptimizerView(_WrappedOptimizerView):
    """DeepSpeed's ``DeepSpeedZeroOptimizer``: every rank steps its partition of every group."""

    shared = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._shards: dict[Tensor, Shard] = {}
        self._owners: dict[Tensor, Tensor] = {}
        for number, owner in enumerate(wrapper.single_partition_of_fp32_groups):
            rank = dist.get_rank(wrapper.real_dp_process_group[number])
            self._shards |= partition_shards(wrapper, number, rank, owner)
            self._owners |= dict.fromkeys(wrapper.bit16_groups[number], owner)
        # Nobody steps these, but a shift that does not train fades with its scale all the same.
        self._still = {p for p in wrapper.param_names if p not in self._owners}

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        groups: Sequence[Sequence[Tensor]] = self._wrapper.bit16_groups
        return groups

    def owner(self, parameter: Tensor) -> Tensor:
        return self._owners[parameter]

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        if parameter in self._still:
            return (Shard(parameter, 0, parameter, 0),)
        return (self._shards[parameter],) if parameter in self._shards else ()

    def listen(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        if all(self.optimizer.state.get(flat) for flat in self._owners.values()):
            # Moments may have been carried over; DeepSpeed would not find them before a step.
            self._wrapper._lazy_init_hp_params_optimizer_state()
        return super().listen(before, hold, after)

    def _moved(self) -> Owners:
        """One group's partition, which is copied back before the next group's turn."""
        return self._still.union(*(group["params"] for group in self.optimizer.param_groups))


def partition_shards(wrapper: Any, number: int, rank: int, owner: Tensor) -> dict[Tensor, Shard]:
    """What lies in one rank's partition of a parameter group.

    Args:
        wrapper: a ``DeepSpeedZeroOptimizer``.
        number: of the group.
        rank: whose partition.
        owner: ``[elements of a partition]``, that the shards are parts of.
    """
    begin, end = rank * owner.numel(), (rank + 1) * owner.numel()
    flat = wrapper.bit16_groups_flat[number]
    shards = {}
    for parameter in wrapper.round_robin_bit16_groups[number]:
        # Parameters are views of the row; there may be padding between them.
        offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        assert 0 <= offset <= flat.numel() - parameter.numel()
        first, last = max(offset, begin), min(offset + parameter.numel(), end)
        if first < last:
            value = owner.detach()[first - begin : last - begin]
            if value.numel() == parameter.numel():
                value = value.view(parameter.shape)
            shards[parameter] = Shard(value, first - offset, owner, first - begin)
    return shards
