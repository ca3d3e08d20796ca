"""FSDP refusals: what ``fully_shard`` can do that has not been verified to be exact."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard

from ..comm_hooks.fsdp_collectives import PackedAllGather, PackedReduceScatter
from .fsdp_sharding import CARRIED, PREFETCHED, Sharding

__all__ = ["refusals"]

_OF_STATE = (
    "_auto_reshard_after_forward",
    "_fsdp_param_groups",
    "_modules",
    "_mp_policy",
    "_post_forward_hook_handle",
    "_pre_forward_hook_handle",
    *PREFETCHED,
)
_OF_GROUP = (
    "_all_gather_comm",
    "_all_reduce_hook",
    "_module_to_pre_load_state_dict_hook_handle",
    "_module_to_pre_save_state_dict_hook_handle",
    "_reduce_scatter_comm",
    "_to_sharded",
    *CARRIED,
)
_OF_GROUP_WITH_REPLICAS = (
    "_all_reduce_state",
    "_partial_reduce_output",
    "_post_reduce_event",
    "_reduce_scatter_process_group",
)
_OF_PARAMETER = ("_module_info", "_post_load_hook_handle", "unsharded_accumulated_grad")
"""Private attributes of torch's objects that are read or written, here or in the collectives."""


def refusals(sharding: Sharding) -> Iterator[str]:
    """Reasons why this sharding is refused, each in one line.

    Args:
        sharding: the sharding of the network.
    """
    if not any(True for _ in sharding.network.parameters()):
        yield "the network has no parameters, so there is nothing to train; wrap the one that has"
    yield from _unknown(sharding)
    if list(inspect.signature(FSDPParamGroup.post_backward).parameters) != ["self", "unused"]:
        yield "FSDPParamGroup.post_backward has an unknown signature; install torch 2.14"
    yield from _of_compilation(sharding.network)
    for module in sharding.network.modules():
        for name, method in vars(module).items():
            code = getattr(getattr(method, "__func__", None), "__code__", None)
            if code is not None and code.co_filename == inspect.getfile(fully_shard.__wrapped__):  # type: ignore[attr-defined]
                yield f"{name} is called like forward (register_fsdp_forward_method); call forward"
    for state in sharding.states:
        if len(state._fsdp_param_groups) > 1:
            yield (
                "a module has several parameter groups (shard_placement_fn returned meshes), whose "
                "collectives cannot be told apart; give all parameters the same mesh"
            )
    for group in sharding.groups:
        yield from _of_group(group)
    meshes = {group.mesh_info.mesh for group in sharding.groups}
    for mesh in meshes:
        if mesh.ndim > 1 and mesh.size() != dist.get_world_size():
            yield (
                f"the two-dimensional mesh has {mesh.size()} of {dist.get_world_size()} ranks, and "
                "no process group of them; make it over all ranks, or one-dimensional"
            )
    if len(meshes) > 1:
        yield "modules are sharded over different meshes; shard all of them over the same one"
    managed = {parameter.sharded_param for parameter in sharding.parameters}
    sharding.reshard()
    for name, parameter in sharding.network.named_parameters():
        if parameter not in managed:
            yield (
                f"parameter {name} is not sharded (ignored_params, or a module outside), and its "
                "gradients are not averaged; let fully_shard have all parameters"
            )


def _unknown(sharding: Sharding) -> Iterator[str]:
    """Attributes that are read or written, and that this version of torch does not have."""
    for state in sharding.states:
        needed: list[tuple[Any, tuple[str, ...]]] = [(state, _OF_STATE)]
        for group in getattr(state, "_fsdp_param_groups", ()):
            needed += [(group, _OF_GROUP), (group.mesh_info, ("is_spmd_mesh",))]
            if isinstance(group.mesh_info, HSDPMeshInfo):
                needed.append((group, _OF_GROUP_WITH_REPLICAS))
            needed += [(parameter, _OF_PARAMETER) for parameter in group.fsdp_params]
        for owner, names in needed:
            for name in names:
                if not hasattr(owner, name):
                    yield (
                        f"{type(owner).__name__} of torch {torch.__version__} has no attribute "
                        f"{name}; install torch 2.14"
                    )


def _of_compilation(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        if "_orig_mod" in module._modules:
            yield (
                f"{name or 'the network'} is torch.compile's wrapper, which keeps the network from "
                "being traced; compile in place, module.compile(), or all of it once it is "
                "sharded, torch.compile(model)"
            )
    if torch._dynamo.config.compiled_autograd:
        yield (
            "torch._dynamo.config.compiled_autograd is on, and the gradients of fully_shard come "
            "out wrong in a compiled backward pass; turn it off"
        )


def _of_group(group: Any) -> Iterator[str]:
    info = group.mesh_info
    if not hasattr(info, "shard_mesh_size"):
        yield "replicate() averages in a collective of torch's own, before any hook; use DDP"
        return
    if info.is_spmd_mesh:
        yield "dp_mesh_dims is for tensor parallelism, which spreads a channel over ranks"
    if info.shard_mesh_size == 1:
        yield "the mesh shards over one rank, where nothing is reduced; attach the bare network"
    if isinstance(group.offload_policy, CPUOffloadPolicy):
        yield "CPUOffloadPolicy keeps weights and gradients on the CPU; leave offload_policy out"
    after = group.post_forward_mesh_info
    if after is not None and after is not info:
        yield "reshard_after_forward as a number gathers on another mesh; choose True or False"
    if group._all_reduce_hook is not None:
        yield "an all-reduce hook is set (set_all_reduce_hook); averages would differ, remove it"
    known = {DefaultAllGather, PackedAllGather, DefaultReduceScatter, PackedReduceScatter}
    if not {type(group._all_gather_comm), type(group._reduce_scatter_comm)} <= known:
        yield "custom collectives are set (set_custom_all_gather and others); leave them out"
    if torch.float16 in (group.mp_policy.param_dtype, group.mp_policy.reduce_dtype):
        yield "fp16 with its loss scale has not been proved exact; choose bf16 or fp32"
    for parameter in group.fsdp_params:
        yield from _of_parameter(parameter)


def _of_parameter(parameter: Any) -> Iterator[str]:
    sharded = parameter.sharded_param
    name = parameter._module_info.param_name
    if parameter.is_dtensor:
        yield f"parameter {name} was a DTensor before (tensor parallelism); use data parallelism"
    elif not isinstance(sharded, DTensor) or sharded.placements[-1] != Shard(0):
        yield f"parameter {name} is sharded by columns (shard_placement_fn); shard dimension 0"
    elif hasattr(sharded.to_local(), "fsdp_pre_all_gather"):
        yield f"parameter {name} is gathered in a form of its own (float8); use plain tensors"
    elif sharded.is_meta:
        yield f"parameter {name} is on the meta device; give it values before attach"
    elif sharded.dtype == torch.float16 or sharded.is_complex():
        yield f"parameter {name} is {sharded.dtype}, which has not been proved exact"
