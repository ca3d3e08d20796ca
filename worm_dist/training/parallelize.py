"""Wraps a network for training on several ranks, and steps it.

In DistributedDataParallel, in DeepSpeed's engine, or by torch's ``fully_shard``.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..backends.deepspeed import is_deepspeed
from ..backends.fsdp_sharding import is_fully_sharded
from ..engine.engine import Engine
from ..errors import BackendError, ConfigError
from .deepspeed_config import deepspeed_settings
from .fully_sharded import shard
from .optim import build_optimizer
from .run_config import RunConfig

__all__ = [
    "averaged_gradients",
    "backend_name",
    "backward",
    "deepspeed_module",
    "num_passes",
    "parallelize",
    "step",
]


def parallelize(
    network: nn.Module,
    config: RunConfig,
    world_size: int,
    device: torch.device,
) -> tuple[nn.Module, Optimizer]:
    """Wrap the network for data-parallel training, and make its optimizer.  Collective.

    Args:
        network: the network, on ``device``.
        config: the run's settings.
        world_size: number of ranks.
        device: this rank's device.

    Returns:
        DistributedDataParallel, the sharded network or DeepSpeed's engine; and the torch optimizer
        of its parameters, which only DeepSpeed wraps.

    Raises:
        ConfigError: DeepSpeed's settings do not fit the run, or there is one rank only to shard
            over.
        BackendError: DeepSpeed is selected but not installed.
    """
    if config.distributed.backend == "fsdp":
        model = shard(network, config.distributed.bucket_cap_mb, world_size, device)
        return model, build_optimizer(config.optimizer, model)  # torch has replaced the parameters
    optimizer = build_optimizer(config.optimizer, network)
    if config.distributed.backend == "deepspeed":
        settings = deepspeed_settings(config, world_size)
        deepspeed = deepspeed_module(device)
        _require_valid(deepspeed, settings, config.distributed.deepspeed)
        engine, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=settings, dist_init_required=False
        )
        return engine, optimizer
    wrapped = DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        bucket_cap_mb=config.distributed.bucket_cap_mb,
        **_fewer_copies(),
    )
    return wrapped, optimizer


def _fewer_copies() -> dict[str, Any]:
    """Arguments of DistributedDataParallel that save work and change no weight.

    ``gradient_as_bucket_view``: averaged gradients stay in the buckets, one copy of each less, in
    time and memory.  The copy into the buckets remains, because ``zero_grad`` drops the views; to
    keep, zero and add to them would cost as much.

    ``forward_sync_buffers``: buffers are not broadcast before each forward pass, so running
    statistics differ from rank to rank, as they do under DeepSpeed.  No weight depends on them:
    norms in training mode use those of the batch, and what a draw needs is estimated from batches
    of all ranks.  Rank zero's, which are tested and saved, are its own with and without the
    broadcast; ``evaluate`` hands them to all ranks.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.14 renamed the argument and warns about the old name.
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {"gradient_as_bucket_view": True, sync: False}


def _require_valid(deepspeed: Any, settings: dict[str, Any], path: str | None) -> None:
    """Raise if DeepSpeed rejects the settings, before it changes anything."""
    deepspeed.init_distributed(dist_init_required=False)  # DeepSpeedConfig needs the world size
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:  # it raises plain exceptions of many types
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"distributed.deepspeed: {path}: DeepSpeed rejects it: {reason}"
        ) from error


def backend_name(model: nn.Module, device: torch.device) -> str:
    """Name of the backend, for people, such as ``deepspeed zero-1, nccl``."""
    transport = "nccl" if device.type == "cuda" else "gloo"
    if is_deepspeed(model):
        stage: Any = model.zero_optimization_stage
        return f"deepspeed zero-{int(stage())}, {transport}"
    return f"fsdp, {transport}" if is_fully_sharded(model) else transport


def num_passes(engine: Engine) -> int:
    """Number of forward and backward passes in an optimizer step (gradient accumulation)."""
    passes = getattr(engine.model, "gradient_accumulation_steps", None)
    return 1 if passes is None else int(passes())


def backward(engine: Engine, loss: Tensor) -> None:
    """Run the backward pass; in the last pass of a step the gradients are averaged."""
    if is_deepspeed(engine.model):
        model: Any = engine.model
        model.backward(loss)
    else:
        loss.backward()


def averaged_gradients(engine: Engine) -> list[Tensor]:
    """Averaged gradients, equal on all ranks; empty if every rank has only its part of them."""
    if not isinstance(engine.model, DistributedDataParallel):
        return []
    return [p.grad for p in engine.model.parameters() if p.grad is not None]


def step(engine: Engine) -> None:
    """Take the optimizer step; under DeepSpeed only after the last pass of the step."""
    if is_deepspeed(engine.model):
        model: Any = engine.model
        model.step()
    else:
        engine.optimizer.step()
        engine.optimizer.zero_grad()


def deepspeed_module(device: torch.device) -> Any:
    """Import DeepSpeed and suppress its log messages and known warnings.

    Raises:
        BackendError: DeepSpeed is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no GPU
    try:
        import deepspeed
    except ImportError as error:
        raise BackendError(
            "distributed.backend: deepspeed is not installed; run: "
            'pip install "worm_dist[deepspeed]"'
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it logs its defaults at every draw
    # torch 2.14 renamed functions that DeepSpeed calls.
    for renamed in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{renamed}", category=FutureWarning)
    if device.type == "cpu":
        # Compiles for half a minute at the first start, for an all-reduce that training never uses.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
