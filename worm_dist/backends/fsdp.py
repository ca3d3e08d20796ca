"""FSDP: a network sharded by torch's ``fully_shard`` (FSDP2), on one- and two-dimensional meshes.

The wrapper is the network itself: ``fully_shard`` changes its modules in place.  A draw takes the
sharding off, cuts the plain network, and shards it again with the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..comm_hooks.fsdp_reduce import FsdpReducer
from ..comm_hooks.reducer import Reducer
from ..config import TruncationConfig
from ..distributed.collectives import Communicator, ProcessGroupComm
from ..errors import BackendError
from .backend import not_compiled
from .fsdp_optimizer import FsdpOptimizerView, local_part
from .fsdp_refusals import refusals
from .fsdp_sharding import Sharding, is_fully_sharded
from .optimizer_view import OptimizerView
from .optimizers import innermost
from .trained_parameters import only_these_train

__all__ = ["FsdpBackend"]


class FsdpBackend:
    """A network sharded by ``fully_shard``; see ``Backend`` for its other members.

    Attributes:
        model: the network.

    Raises:
        BackendError: it is sharded in a way that has not been verified to be exact.
    """

    shards_weights = True
    averages = True
    finds_unused = False
    keeps_hooks = False
    rebuilds_buckets = False

    def __init__(self, model: nn.Module) -> None:
        self.model = self.called = model
        self._sharding = Sharding(model if is_fully_sharded(model) else not_compiled(model))
        for reason in refusals(self._sharding):
            raise BackendError(f"attach: fully_shard: {reason}")
        self._is_released = False
        self._trains: dict[str, bool] = {}
        info = self._sharding.groups[0].mesh_info
        self.has_one_copy: bool = info.mesh.ndim == 1
        self.process_group: dist.ProcessGroup = _group_of_all(info.mesh)
        self.comm: Communicator = _ReplicatedComm(
            self.process_group, self._sharding.groups[0].device, info.shard_process_group
        )
        self.averaged: frozenset[Tensor] = frozenset(
            parameter.sharded_param
            for parameter in self._sharding.parameters
            if parameter.sharded_param.requires_grad
        )

    @property
    def network(self) -> nn.Module:
        """The network, with its sharded parameters; within ``full_network`` with full ones."""
        self._sharding.reshard()
        return self._sharding.network

    @property
    def step_bytes(self) -> int:
        """Bytes of the reduce-scatter of all gradients, of the all-reduce of this rank's shards of
        them over replicas if there are any, and of its shards of the weights for a forward and a
        backward pass; see ``Backend``."""
        total = 0
        outermost = self._sharding.states[-1]
        kept = outermost._fsdp_param_groups if outermost._auto_reshard_after_forward else []
        for group in self._sharding.groups:
            # torch itself decides on the outermost module, in its first pass.
            num_gathers = 1 if group in kept or group.post_forward_mesh_info is None else 2
            for parameter in group.fsdp_params:
                shard = parameter.padded_sharded_param_size.numel()
                policy, dtype = group.mp_policy, parameter.sharded_param.dtype
                weight = (policy.param_dtype or dtype).itemsize
                gradient = (policy.reduce_dtype or policy.param_dtype or dtype).itemsize
                total += num_gathers * shard * weight
                if parameter.sharded_param.requires_grad:
                    has_replicas = group.mesh_info.mesh.ndim > 1
                    total += (group.mesh_info.shard_mesh_size + has_replicas) * shard * gradient
        return total

    @contextmanager
    def full_network(self) -> Iterator[nn.Module]:
        """See ``Backend``."""
        if self._sharding.is_plain:  # in a draw
            yield self._sharding.network
            return
        try:
            self._sharding.take_off()
            yield self._sharding.network
        finally:
            if not self._is_released:
                self._sharding.put_on()

    def make_available(self, parameters: Sequence[Tensor]) -> None:
        """Do nothing: torch's own operations gather them; see ``Backend``."""

    def full_values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """See ``Backend``; in float32."""
        flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        values = flat.split([parameter.numel() for parameter in parameters])
        for parameter, value in zip(parameters, values, strict=True):
            assert isinstance(parameter, DTensor)
            local, begin = local_part(parameter)
            value[begin : begin + local.numel()] = local.reshape(-1)
        values = self.comm.all_reduce_disjoint(flat).split([p.numel() for p in parameters])
        return [value.view(p.shape) for p, value in zip(parameters, values, strict=True)]

    def reduces_at_once(self, truncation: TruncationConfig) -> bool:
        """Always, so that bytes are counted in the same way in every phase."""
        return True

    def make_reducer(self, truncation: TruncationConfig) -> Reducer:
        """Set custom collectives on the parameter groups; see ``Backend``."""
        return FsdpReducer(self._sharding.groups)

    def optimizer_view(self, optimizer: Optimizer | None) -> OptimizerView:
        """See ``Backend``."""
        return FsdpOptimizerView(innermost(optimizer), self._sharding.reshard)

    def user_optimizer(self, view: OptimizerView) -> Optimizer:
        """See ``Backend``."""
        return view.optimizer

    def require_fit(self, truncation: TruncationConfig) -> None:
        """Refuse settings that are not supported under ``fully_shard``.

        Raises:
            BackendError: naming the first one.
        """
        if truncation.mode == "soft":
            raise BackendError(
                "attach: truncation.mode 'soft' is not supported under fully_shard, where "
                "gradients reach the parameters without hooks; choose hard"
            )
        if truncation.mode == "hard" and truncation.frozen_weights == "free":
            raise BackendError(
                "attach: truncation.frozen_weights 'free' is not supported under fully_shard; "
                "choose remove or hold"
            )
        if truncation.compression != "none":
            raise BackendError(
                f"attach: truncation.compression {truncation.compression!r} is not supported under "
                "fully_shard; give it mp_policy=MixedPrecisionPolicy(reduce_dtype=...)"
            )

    def release(self) -> None:
        """Keep the network plain when ``full_network`` ends; see ``Backend``."""
        assert self._sharding.is_plain
        self._is_released = True

    def rewrap(self) -> nn.Module:
        """Shard the network as it is now in the same way; see ``Backend``.  Until ``retire``
        exactly the averaged parameters require gradients, as the new backend is to find them."""
        full = self._sharding.full
        self._trains = {name: p.requires_grad for name, p in self.model.named_parameters()}
        with only_these_train(self.model, {full[parameter] for parameter in self.averaged}):
            self._sharding.renew()
        return self.model

    def retire(self) -> None:
        """Let the parameters require gradients that did before ``rewrap``; the old sharding is gone
        already."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trains[name])

    def revive(self) -> nn.Module:
        """Restore the old sharding; see ``Backend``."""
        self._sharding.put_on()
        self._is_released = False
        return self.model


class _ReplicatedComm(ProcessGroupComm):
    """The collectives over all ranks of a mesh; those that put shards together run among the ranks
    that have them, because other ranks may have the same ones again.

    Args:
        group: the process group of all ranks.
        device: the device on which collectives expect their tensors.
        shard_group: the process group of the ranks that together have all shards.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, shard_group: dist.ProcessGroup
    ) -> None:
        super().__init__(group, device)
        self._sharing = (
            self
            if dist.get_world_size(shard_group) == self.size
            else ProcessGroupComm(shard_group, device)
        )

    def merge_disjoint(self, memory: Tensor) -> None:
        if self._sharing is self:
            super().merge_disjoint(memory)
        else:
            self._count(memory)
            self._sharing.merge_disjoint(memory)


def _group_of_all(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of all ranks of a mesh."""
    group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD  # others are refused
    assert isinstance(group, dist.ProcessGroup)
    return group
