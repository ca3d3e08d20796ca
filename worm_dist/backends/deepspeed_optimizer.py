"""DeepSpeed optimizer views: the master weights that DeepSpeed's optimizers step.

In stage 0 every rank has full copies of the parameters.  In stages 1 and 2 the copies of a
parameter group are one flat tensor, of which each rank holds and steps one partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..comm_hooks.patching import Patch
from .optimizer_view import Handle, OptimizerView, Owners, Shard

__all__ = [
    "CopyingOptimizerView",
    "PartitionedOptimizerView",
    "WrappedOptimizerView",
    "partition_shards",
]


class WrappedOptimizerView(OptimizerView):
    """View of the torch optimizer in a DeepSpeed wrapper, which may skip a step, step once per
    parameter group, or step once to initialise its state."""

    copies = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.optimizer)
        self._wrapper = wrapper

    def register_hooks(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            before()
            result = patch.original(*arguments, **keywords)
            if not self._wrapper.overflow:
                after()
            return result

        patch = Patch(self._wrapper, "step", step)
        hook = self.optimizer.register_step_post_hook(lambda *_: hold(self._stepped_tensors()))
        return [patch, hook]

    def _stepped_tensors(self) -> Owners:
        """The tensors that the torch optimizer has just stepped."""
        return None


class CopyingOptimizerView(WrappedOptimizerView):
    """View of DeepSpeed's ``FP16_UnfusedOptimizer``: every rank steps a copy of every parameter."""

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


class PartitionedOptimizerView(WrappedOptimizerView):
    """View of DeepSpeed's ``DeepSpeedZeroOptimizer``: every rank steps its partition of every
    parameter group."""

    shared = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._shards: dict[Tensor, Shard] = {}
        self._owners: dict[Tensor, Tensor] = {}
        for number, owner in enumerate(wrapper.single_partition_of_fp32_groups):
            rank = dist.get_rank(wrapper.real_dp_process_group[number])
            self._shards |= partition_shards(wrapper, number, rank, owner)
            self._owners |= dict.fromkeys(wrapper.bit16_groups[number], owner)
        # Not stepped by any rank, but an untrained shift still fades together with its scale.
        self._untrained = {p for p in wrapper.param_names if p not in self._owners}

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        groups: Sequence[Sequence[Tensor]] = self._wrapper.bit16_groups
        return groups

    def owner(self, parameter: Tensor) -> Tensor:
        return self._owners[parameter]

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        if parameter in self._untrained:
            return (Shard(parameter, 0, parameter, 0),)
        return (self._shards[parameter],) if parameter in self._shards else ()

    def register_hooks(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        if all(self.optimizer.state.get(flat) for flat in self._owners.values()):
            # Transferred moments: DeepSpeed would not link them before the first step.
            self._wrapper._lazy_init_hp_params_optimizer_state()
        return super().register_hooks(before, hold, after)

    def _stepped_tensors(self) -> Owners:
        """One parameter group's partition, which is copied back before the next group is
        stepped."""
        return self._untrained.union(*(group["params"] for group in self.optimizer.param_groups))


def partition_shards(wrapper: Any, number: int, rank: int, owner: Tensor) -> dict[Tensor, Shard]:
    """The shards in one rank's partition of a parameter group.

    Args:
        wrapper: the ``DeepSpeedZeroOptimizer``.
        number: index of the parameter group.
        rank: rank that owns the partition.
        owner: the partition ``[elements]``, of which the shards are views.

    Returns:
        The shards by parameter.
    """
    begin, end = rank * owner.numel(), (rank + 1) * owner.numel()
    flat = wrapper.bit16_groups_flat[number]
    shards = {}
    for parameter in wrapper.round_robin_bit16_groups[number]:
        # Parameters are views of the flat tensor; there may be padding between them.
        offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        assert 0 <= offset <= flat.numel() - parameter.numel()
        first, last = max(offset, begin), min(offset + parameter.numel(), end)
        if first < last:
            value = owner.detach()[first - begin : last - begin]
            if value.numel() == parameter.numel():
                value = value.view(parameter.shape)
            shards[parameter] = Shard(value, first - offset, owner, first - begin)
    return shards
