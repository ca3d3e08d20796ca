"""ZeRO-3 optimizer view: the master weights that DeepSpeed's stage 3 steps.

Every parameter is flattened and cut into equal parts, one for each rank, the last one padded.  A
rank's parts of a parameter group are one flat tensor, or several of bounded size (sub-groups).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..groups.full_shape import full_numel, full_shape
from .deepspeed_optimizer import WrappedOptimizerView
from .optimizer_view import Owners, Shard
from .zero3_weights import zero3_part

__all__ = ["Zero3OptimizerView"]


class Zero3OptimizerView(WrappedOptimizerView):
    """View of DeepSpeed's ``DeepSpeedZeroOptimizer_Stage3``: every rank steps its part of every
    parameter.

    Args:
        wrapper: the ``DeepSpeedZeroOptimizer_Stage3``.
    """

    shared = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._groups: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        self._owners: dict[Tensor, Tensor] = {}
        self._numbers: dict[Tensor, int] = {}
        self._shards: dict[Tensor, tuple[Shard, ...]] = {}
        owners: Sequence[Tensor] = wrapper.fp32_partitioned_groups_flat
        for number, (owner, stepped) in enumerate(zip(owners, wrapper.fp16_groups, strict=True)):
            self._numbers[owner] = group = wrapper.sub_group_to_group_id[number]
            self._groups[group].extend(stepped)
            offset = 0
            for parameter in stepped:
                self._owners[parameter] = owner
                self._shards[parameter] = _shards(parameter, owner, offset)
                offset += parameter.ds_tensor.ds_numel
            assert offset == owner.numel()
        # Not stepped by any rank, but an untrained shift still fades together with its scale.
        untrained = [
            parameter for parameter in wrapper.param_names if parameter not in self._owners
        ]
        self._shards |= {p: _shards(p, p.ds_tensor, 0) for p in untrained}
        self._untrained = {p.ds_tensor for p in untrained}

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        return self._groups

    def owner(self, parameter: Tensor) -> Tensor:
        return self._owners[parameter]

    def options(self, owner: Tensor) -> dict[str, Any]:
        """See ``OptimizerView``; DeepSpeed lists an owner only while it is stepped."""
        options: dict[str, Any] = self.optimizer.param_groups[self._numbers[owner]]
        return options

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        return self._shards[parameter]

    def weights(self, parameter: Any, shard: Shard) -> Tensor:
        part, _ = zero3_part(parameter)
        return part.view(shard.value.shape)

    def _stepped_tensors(self) -> Owners:
        """One sub-group's flat tensor, which is copied back before the next one is stepped."""
        return self._untrained.union(*(group["params"] for group in self.optimizer.param_groups))


def _shards(parameter: Any, owner: Tensor, offset: int) -> tuple[Shard, ...]:
    """This rank's part of a parameter, without padding; none if it is padding alone.

    Args:
        parameter: the parameter.
        owner: the flat tensor that has the part.
        offset: the part's first element in it.
    """
    part, begin = zero3_part(parameter)
    if not part.numel():
        return ()
    value = owner.detach()[offset : offset + part.numel()]
    if value.numel() == full_numel(parameter):
        value = value.view(full_shape(parameter))
    return (Shard(value, begin, owner, offset),)
