"""Recognition: the backend of a model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.contract import _get_registry
from torch.nn.parallel import DistributedDataParallel

from ..errors import BackendError
from .backend import Backend, not_compiled
from .ddp import DdpBackend
from .deepspeed import DeepSpeedBackend, is_deepspeed
from .fsdp_sharding import is_fully_sharded
from .single_process import SingleProcess
from .zero3 import Zero3Backend

__all__ = ["backend_of"]

_UNSUPPORTED = {
    "DataParallel": "nn.DataParallel is not supported; wrap it in DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel (FSDP1) is not supported, because it "
    "flattens parameters; use fully_shard (FSDP2)",
    "ReplicateModule": "replicate() is not supported, because it averages gradients before any "
    "hook; wrap the network in DistributedDataParallel",
    "replicate": "replicate() is not supported, because it hides its DistributedDataParallel; wrap "
    "the network in DistributedDataParallel itself",
    "FSDPModule": "fully_shard in a part of the network alone is not supported; apply it to the "
    "whole network too",
}
"""Names of module classes, and of the contracts that torch's functions register on modules, with
the reason for their refusal."""


def backend_of(model: nn.Module) -> Backend:
    """The backend of a model.

    Raises:
        BackendError: several processes, but a bare model; a compiled wrapper; an unsupported
            wrapper or DeepSpeed engine.
    """
    if is_deepspeed(model):
        return _deepspeed(model)
    if is_fully_sharded(model) or is_fully_sharded(not_compiled(model)):
        return _fsdp(model)
    _require_not_sharded(model)
    if isinstance(model, DistributedDataParallel):
        return DdpBackend(model)
    if isinstance(not_compiled(model), DistributedDataParallel):
        raise BackendError(
            "attach: torch.compile around DistributedDataParallel compiles nothing here; compile "
            "the network, then wrap it: DistributedDataParallel(torch.compile(network))"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise BackendError(
            f"attach: {dist.get_world_size()} processes train together, but the model is a bare "
            f"{type(model).__name__}; wrap it in DistributedDataParallel, shard it by "
            "fully_shard, or give it to deepspeed.initialize, first"
        )
    return SingleProcess(model)


def _fsdp(model: nn.Module) -> Backend:
    try:
        # Not imported before it is needed: its parts of torch are not a public interface.
        from .fsdp import FsdpBackend
    except ImportError as error:
        raise BackendError(
            f"attach: fully_shard of torch {torch.__version__} is not known; install torch 2.14"
        ) from error
    return FsdpBackend(model)


def _deepspeed(model: Any) -> Backend:
    return Zero3Backend(model) if model.zero_optimization_stage() == 3 else DeepSpeedBackend(model)


def _require_not_sharded(model: nn.Module) -> None:
    """Refuse models that are parallel in an unsupported way.

    Raises:
        BackendError: naming the way.
    """
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for kind, reason in _UNSUPPORTED.items():
            if kind in kinds or kind in (_get_registry(module) or {}):
                raise BackendError(f"attach: {reason}")
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise BackendError(
            "attach: parameters of the model are DTensors (tensor parallelism), which are not "
            "supported; use fully_shard (FSDP2) or DistributedDataParallel on the whole network"
        )
