"""FSDP replicas: a function of ours in place of torch's all-reduce over the replicas of a shard.

On a two-dimensional mesh ``fully_shard`` reduce-scatters gradients among the ranks that share the
weights, and then averages every shard over its replicas, by a collective that nothing can replace.
On a one-dimensional mesh it calls a hook there instead.  So a group is shown a mesh of one
dimension while its gradients are reduced.  Its parameters have their own view of the mesh, from
which torch makes their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import _get_gradient_divide_factors
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import AllReduceState

from .packing import Packing

__all__ = ["Replicas"]


class Replicas:
    """The replicas of one parameter group's shards.

    Args:
        group: torch's parameter group, on a two-dimensional mesh.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        info = group.mesh_info
        self._process_group: dist.ProcessGroup = info.replicate_process_group
        self._of_shards = FSDPMeshInfo(info.mesh, shard_mesh_dim=info.shard_mesh_dim)

    @contextmanager
    def hooked(self, all_reduce: Callable[[Tensor], None]) -> Iterator[None]:
        """Context in which a pass of the group calls a function instead of torch's all-reduce.

        torch calls it on its stream for all-reduces, which waits for the reduce-scatter, and goes
        on with the result on the same stream.

        Args:
            all_reduce: receives this rank's row, ``[elements of a row]``, after the
                reduce-scatter, and averages it in place.
        """
        group = self._group
        info, previous = group.mesh_info, group._all_reduce_hook
        reduced: list[Tensor] = []

        def hook(own: Tensor) -> None:
            reduced.append(own)
            all_reduce(own)

        # A separate one may have been set since (set_separate_reduce_scatter_group).
        self._of_shards.reduce_scatter_process_group = info.reduce_scatter_process_group
        group.mesh_info, group._all_reduce_hook = self._of_shards, hook
        try:
            yield
        finally:
            group.mesh_info, group._all_reduce_hook = info, previous
        if reduced:
            # The row was allocated on the stream of reduce-scatters.  Were it freed now, that
            # stream could write the next group's row there while this one is still being read.
            # torch keeps rows of its own all-reduces for that reason until the group's next pass,
            # or the end of the backward pass, has waited for them; so this one is given to it.
            group._all_reduce_state = AllReduceState(reduced[0], group._post_reduce_event)

    def add_partial(self, row: Tensor) -> None:
        """Add what passes without an all-reduce have left to a row, as torch does it before its own
        one: on the stream of reduce-scatters, where both were allocated; torch drops it then."""
        partial = self._group._partial_reduce_output
        if partial is not None:
            row += partial

    def all_reduce(self, row: Tensor, packing: Packing, memory: Tensor) -> None:
        """Average the live elements of a row over the replicas, and write zeros to frozen ones.
        All replicas of a shard have the same live elements.

        Args:
            row: ``[elements of a row]``.
            packing: the live elements of this rank's row.
            memory: at least ``[live elements + scratch_size]``.
        """
        # The indices were made on the stream of reduce-scatters, for which this one has waited.
        # They are freed between passes; what that stream is given next waits for this pass to end.
        live = memory[: packing.num_live]
        packing.lend(memory[packing.num_live :])
        packing.pack(row, live)
        if len(live):
            group = self._group
            factor = group.gradient_divide_factor
            *_, op = _get_gradient_divide_factors(
                group._reduce_scatter_process_group,
                self._process_group,
                row.dtype,
                row.device.type,
                factor,
                group.force_sum_reduction_for_comms,
            )
            dist.all_reduce(live, op=op, group=self._process_group)
            if op == dist.ReduceOp.SUM and factor is None:
                # torch divides sums itself, but on one dimension by the number of shards alone.
                live /= dist.get_world_size(self._process_group)
        packing.unpack(row, live)
