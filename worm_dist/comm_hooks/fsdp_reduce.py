"""FSDP reduction: reduce-scatter of gradients and all-gather of weights, without frozen slices.

``fully_shard`` lets both collectives be replaced for each of its groups of parameters, and with
some help the all-reduce over replicas too.  Scaling, precision and process groups stay its own.  A
group without frozen slices is sent as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..errors import BackendError
from ..groups.freeze_plan import Block, FreezePlan
from .fsdp_collectives import PackedAllGather, PackedReduceScatter
from .fsdp_replicas import Replicas
from .fsdp_rows import PackedRows, is_any_frozen, pieces_of
from .grad_hooks import registered
from .patching import Patch
from .reducer import Reducer

__all__ = ["FsdpReducer"]


class FsdpReducer(Reducer):
    """Packs the gradients that ``fully_shard`` reduces, and the weights that it gathers.

    Weights need not be gathered where their channel's output is exactly zero: their ranks keep
    them, and the others read zeros.  Outputs and live gradients are the same.

    Args:
        groups: torch's parameter groups.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        super().__init__()
        self._groups = [_Group(self, group) for group in groups]
        self._memory: dict[tuple[object, ...], Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def _follow(self, plan: FreezePlan, held: FreezePlan, fading: Collection[Tensor]) -> None:
        self._forget()
        # What a loss adds to the shards themselves, such as a penalty, is not reduced.
        self._hooks = [
            registered(parameter, _zeroing(block, parameter))
            for parameter, block in plan.blocks.items()
            if isinstance(parameter, DTensor)
        ]

    def remove(self) -> None:
        super().remove()
        self._forget()
        for group in self._groups:
            group.remove()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._memory.clear()
        for group in self._groups:
            group.rows.clear()

    def memory(self, what: str, size: int, like: Tensor) -> Tensor:
        """Memory that the collectives of one kind share, at least ``[size]``.

        Args:
            what: the kind.  torch calls all of one kind on one stream, except for a user's
                ``unshard`` on the user's; memory is shared on one stream alone.
            size: number of elements.
            like: a tensor of its dtype and device.
        """
        stream = torch.cuda.current_stream(like.device).stream_id if like.is_cuda else 0
        key = what, like.dtype, stream
        if key not in self._memory or len(self._memory[key]) < size:
            self._memory[key] = like.new_empty(size)
        return self._memory[key]

    def probe_rows(
        self, shapes: Sequence[torch.Size], parameters: Sequence[Tensor], rows: Tensor
    ) -> None:
        """Probe the gradients of a group before they are reduced; see ``probe_bucket``.

        Args:
            shapes: the parameters' shapes.
            parameters: the parameters that have gradients.
            rows: ``[ranks, elements of a row]``.
        """
        if self.nonzero_seen is None:
            return
        self.num_buckets_probed += 1
        if not is_any_frozen(self._probed, parameters):
            return
        for row, pieces in zip(rows, pieces_of(shapes, len(rows))[0], strict=True):
            for number, first, num_rows, offset in pieces:
                block = self._probed.get(parameters[number])
                if block is not None:
                    shape = (num_rows, *shapes[number][1:])
                    size = num_rows * shapes[number][1:].numel()
                    gradient = row[offset : offset + size].view(shape)
                    for dim, frozen in block.rows(first, num_rows).frozen.items():
                        # A NaN counts as non-zero.
                        self.nonzero_seen += (gradient.index_select(dim, frozen) != 0).any()


class _Group:
    """The collectives of one parameter group.

    Attributes:
        rows: packed rows by collective, parameters and dtype; None if nothing of them is frozen.
    """

    def __init__(self, reducer: FsdpReducer, group: Any) -> None:
        self._reducer = reducer
        self._group = group
        self._with_gradients: list[Tensor] = []
        has_replicas = hasattr(group.mesh_info, "replicate_process_group")
        self._replicas = Replicas(group) if has_replicas else None
        self.rows: dict[tuple[object, ...], PackedRows | None] = {}
        self._previous = group._reduce_scatter_comm, group._all_gather_comm
        group._reduce_scatter_comm = PackedReduceScatter(self.reduce_scatter)
        group._all_gather_comm = PackedAllGather(self.all_gather)
        # The gradients of a backward pass are put together here; parameters without one are left
        # out, and the reduce-scatter is not told which.
        self._patch = Patch(group, "post_backward", self._post_backward)

    def remove(self) -> None:
        self._patch.remove()
        self.rows.clear()
        self._group._reduce_scatter_comm, self._group._all_gather_comm = self._previous

    def _post_backward(self, *unused: Any) -> None:
        if self._group._all_reduce_hook is not None:
            raise BackendError(
                "backward: an all-reduce hook has been set since attach (set_all_reduce_hook); "
                "averages would differ, remove it"
            )
        includes_all = self._group.reduce_scatter_unused_params
        self._with_gradients = [
            parameter.sharded_param
            for parameter in self._group.fsdp_params
            if hasattr(parameter, "_unsharded_param")
            and (
                parameter.unsharded_accumulated_grad is not None
                or parameter._unsharded_param.grad is not None
                or (includes_all and parameter._unsharded_param.requires_grad)
            )
        ]
        plan, replicas = self._reducer.plan, self._averaging
        packs = plan is not None and is_any_frozen(plan.blocks, self._with_gradients)
        with replicas.hooked(self.all_reduce) if packs and replicas else nullcontext():
            self._patch.original(*unused)

    @property
    def _averaging(self) -> Replicas | None:
        """The replicas over which a pass averages gradients; None if it does not."""
        return self._replicas if self._group.all_reduce_grads else None

    def reduce_scatter(
        self, out: Tensor, flat: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp
    ) -> bool:
        """Reduce packed rows; returns whether it was done."""
        reducer, num_ranks = self._reducer, dist.get_world_size(group)
        parameters = self._with_gradients
        shapes = [parameter.shape for parameter in parameters]
        rows = flat.view(num_ranks, -1)
        assert rows.shape[1] == pieces_of(shapes, num_ranks)[1], "gradients are missing"
        replicas = self._averaging
        dense_bytes = flat.nbytes + (0 if replicas is None else out.nbytes)
        reducer.dense_bytes += dense_bytes
        reducer.probe_rows(shapes, parameters, rows)
        packed = self._packed("gradients", reducer.plan, parameters, rows[0], group)
        if packed is None:
            reducer.sent_bytes += dense_bytes
            return False
        memory = reducer.memory("gradients", packed.lent_size, flat)
        packed.reduce_scatter(out, rows, group, op, memory)
        reducer.sent_bytes += packed.shares.num_reduced * flat.element_size()
        if replicas is not None:
            replicas.add_partial(out)
        return True

    def all_reduce(self, row: Tensor) -> None:
        """Average this rank's packed row over the replicas."""
        reducer, info = self._reducer, self._group.mesh_info
        parameters, group = self._with_gradients, info.shard_process_group
        packed = self._packed("gradients", reducer.plan, parameters, row, group)
        assert packed is not None and self._replicas is not None
        packing = packed.of_rank(info.shard_mesh_rank)
        memory = reducer.memory("replicas", packing.num_live + packing.scratch_size, row)
        self._replicas.all_reduce(row, packing, memory)
        reducer.sent_bytes += packing.num_live * row.element_size()

    def all_gather(self, out: Tensor, own: Tensor, group: dist.ProcessGroup) -> bool:
        """Gather packed rows; returns whether it was done."""
        reducer, num_ranks = self._reducer, dist.get_world_size(group)
        parameters = [parameter.sharded_param for parameter in self._group.fsdp_params]
        # An evaluation gathers weights too, but is not part of a step.
        is_counted = any(module.training for module in self._group.modules)
        reducer.dense_bytes += own.nbytes * is_counted
        rows, plan = out.view(num_ranks, -1), reducer.unread
        if own.dtype == torch.uint8:  # parameters of several dtypes, as bytes
            plan = None
        packed = self._packed("weights", plan, parameters, rows[0], group)
        if packed is None:
            reducer.sent_bytes += own.nbytes * is_counted
            return False
        packed.all_gather(rows, own, group, reducer.memory("weights", packed.lent_size, own))
        reducer.sent_bytes += packed.shares.num_gathered * own.element_size() * is_counted
        return True

    def _packed(
        self,
        what: str,
        plan: FreezePlan | None,
        parameters: Sequence[Tensor],
        row: Tensor,
        group: dist.ProcessGroup,
    ) -> PackedRows | None:
        key = (what, row.dtype, *map(id, parameters))
        if key not in self.rows:
            self.rows[key] = None
            blocks: Mapping[Tensor, Block] = {} if plan is None else plan.blocks
            if is_any_frozen(blocks, parameters):
                shapes = [parameter.shape for parameter in parameters]
                here = [blocks.get(parameter) for parameter in parameters]
                rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
                self.rows[key] = PackedRows(shapes, here, row, rank, num_ranks)
        return self.rows[key]


def _zeroing(block: Block, parameter: DTensor) -> Callable[[DTensor], DTensor]:
    """A hook that writes zeros to the frozen elements of a sharded gradient."""

    # Selected here, because on a GPU the host waits for indices to be counted.
    num_rows = len(parameter.to_local())
    here = block.rows(_first_row(parameter), num_rows).frozen if num_rows else {}

    def zero(gradient: DTensor) -> DTensor:
        local = gradient.to_local().clone()
        for dim, frozen in here.items():
            local.index_fill_(dim, frozen, 0)
        return DTensor.from_local(
            local,
            gradient.device_mesh,
            gradient.placements,
            run_check=False,
            shape=gradient.shape,
            stride=gradient.stride(),
        )

    return zero


def _first_row(parameter: DTensor) -> int:
    """The first row of a parameter that this rank has."""
    dim = parameter.device_mesh.ndim - 1
    most = -(-len(parameter) // parameter.device_mesh.size(dim))
    return min(parameter.device_mesh.get_local_rank(dim) * most, len(parameter))
