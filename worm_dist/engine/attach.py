"""Attach: put an engine on a training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..config import WormConfig
from ..errors import ConfigError
from ..extras import require_extras
from ..search.elbow import extras_of_rule
from .check_schedule import require_countable
from .engine import Engine, ScoreFunction
from .memory import log_memory

__all__ = ["attach"]


@torch.inference_mode(False)  # tensors made in inference mode cannot be trained
def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    config: WormConfig | None = None,
    *,
    example_inputs: Any,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
    score: ScoreFunction | None = None,
) -> Engine:
    """Attach an engine to a training.  Collective: every rank calls it.

    That takes some passes of the network on copies, for large ones a minute; rank zero logs what it
    does at the moment at level INFO.

    Args:
        model: a ``DistributedDataParallel``, a network sharded by ``fully_shard`` (FSDP2), a
            DeepSpeed engine (ZeRO stages 0 to 3), or a bare module on a single process.
        optimizer: the optimizer of the model's parameters.  For a DeepSpeed engine leave it out, or
            give the one that ``deepspeed.initialize`` returned.
        config: the settings; default ``WormConfig()``.
        example_inputs: small inputs on the model's device to trace the network with: a tensor for
            ``model(x)``, a tuple or list for ``model(x, y)``, a dict of keyword inputs for
            ``model(images=x)``.  They may be nested; a single input that is itself a list or a
            dict, as in detection networks, is put in a tuple: ``([image, image],)``.
        steps_per_epoch: optimizer steps in an epoch.  Not needed where ``search.every`` is in
            epochs: then it is counted between two checks.
        total_steps: optimizer steps of the whole training, from its first one on, also in a run
            that is resumed.  With it truncation starts after a tenth of the training at the latest
            (``search.elbow.latest``), and gradual removal takes a fifth of it
            (``truncation.removal.duration``).
        score: a custom importance instead of ``search.importance``: called with the network and a
            group, it returns floats ``[num_channels]``, higher for channels to keep.  It may depend
            on this rank's data; the ranks average it.

    Raises:
        ConfigError: an argument is of another type; the network cannot be traced, or has nothing
            to rank channels by; an epoch's length is needed but not known; or the elbow rule needs
            a package that is not installed.
        BackendError: several processes but a bare module; a communication hook already registered.
        DivergenceError: the ranks trace different networks, or have different settings.
    """
    config = WormConfig() if config is None else config
    _require_types(model, config, steps_per_epoch, total_steps)
    require_extras(extras_of_rule(config.search))
    require_countable(config, steps_per_epoch, total_steps)
    engine = Engine(model, optimizer, config, example_inputs, steps_per_epoch, total_steps, score)
    if engine._ranking is not None:
        log_memory(engine._training, engine._ranking, engine.groups, config)
    return engine


def _require_types(
    model: object, config: object, steps_per_epoch: object, total_steps: object
) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConfigError(f"attach: the model is {what}; give a module")
    if not isinstance(config, WormConfig):
        raise ConfigError(
            f"attach: config is {type(config).__name__}; give worm_dist.WormConfig(search={{...}}) "
            "or WormConfig.preset(name)"
        )
    for name, steps, example in (
        ("steps_per_epoch", steps_per_epoch, "len(loader)"),
        ("total_steps", total_steps, "epochs * len(loader)"),
    ):
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ConfigError(
                f"attach: {name} is {str(steps)[:50]}; give a number of optimizer steps above 0, "
                f"such as {example}"
            )
