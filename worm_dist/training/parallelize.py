"""Wrapped: the network in DistributedDataParallel or DeepSpeed's engine, and a step of either."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..engine.engine import Engine
from ..errors import BackendError, ConfigError
from .deepspeed_config import deepspeed_settings
from .run_config import RunConfig

__all__ = [
    "averaged_gradients",
    "backend_name",
    "backward",
    "deepspeed_module",
    "num_passes",
    "step",
    "wrapped",
]


def wrapped(
    network: nn.Module,
    optimizer: Optimizer,
    config: RunConfig,
    world_size: int,
    device: torch.device,
) -> nn.Module:
    """The network as its ranks train it together.  Collective.

    Raises:
        ConfigError: DeepSpeed's settings do not fit the run.
        BackendError: DeepSpeed is asked for but not installed.
    """
    if config.distributed.backend == "deepspeed":
        settings = deepspeed_settings(config, world_size)
        deepspeed = deepspeed_module(device)
        _require_valid(deepspeed, settings, config.distributed.deepspeed)
        model, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=settings, dist_init_required=False
        )
        engine: nn.Module = model
        return engine
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        bucket_cap_mb=config.distributed.bucket_cap_mb,
    )


def _require_valid(deepspeed: Any, settings: dict[str, Any], path: str | None) -> None:
    """What DeepSpeed itself does not take, before it does anything else."""
    deepspeed.init_distributed(dist_init_required=False)  # it counts the ranks
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:  # it has an error of its own for nothing that it checks
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"distributed.deepspeed: {path}: DeepSpeed refuses it: {reason}"
        ) from error


def backend_name(model: nn.Module, device: torch.device) -> str:
    """What the ranks train together with, for people."""
    carrier = "nccl" if device.type == "cuda" else "gloo"
    stage = getattr(model, "zero_optimization_stage", None)
    return carrier if stage is None else f"deepspeed zero-{int(stage())}, {carrier}"


def num_passes(engine: Engine) -> int:
    """Forward and backward passes in an optimizer step."""
    passes = getattr(engine.model, "gradient_accumulation_steps", None)
    return 1 if passes is None else int(passes())


def backward(engine: Engine, loss: Tensor) -> None:
    """The end of a pass; after the last one of a step the gradients are averaged."""
    if isinstance(engine.model, DistributedDataParallel):
        loss.backward()
    else:
        model: Any = engine.model
        model.backward(loss)


def averaged_gradients(engine: Engine) -> list[Tensor]:
    """What the ranks have averaged, the same on each.  DeepSpeed keeps its gradients to itself,
    each rank a part."""
    if not isinstance(engine.model, DistributedDataParallel):
        return []
    return [p.grad for p in engine.model.parameters() if p.grad is not None]


def step(engine: Engine) -> None:
    """The end of a step, if its last pass is done."""
    if isinstance(engine.model, DistributedDataParallel):
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    else:
        model: Any = engine.model
        model.step()


def deepspeed_module(device: torch.device) -> Any:
    """DeepSpeed, imported and silenced.

    Raises:
        BackendError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found nothing better
    try:
        import deepspeed
    except ImportError as error:
        raise BackendError(
            "distributed.backend: deepspeed is not installed here; pip install worm_dist[deepspeed]"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # of its own choices, at every draw
    # torch 2.14 renamed a function that DeepSpeed calls.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    if device.type == "cpu":
        # Half a minute of compiling at the first start, for an all-reduce that training never
        # calls.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
