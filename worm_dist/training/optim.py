"""Builds the optimizer and the learning rate schedule from the settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .run_config import OptimizerConfig, ScheduleConfig

__all__ = ["ScheduleStart", "build_optimizer", "build_schedule"]


def build_optimizer(config: OptimizerConfig, network: nn.Module) -> Optimizer:
    """Build the optimizer over all parameters of the network, which is on its device."""
    on_gpu = next(network.parameters()).device.type == "cuda"
    # None is torch's own choice, which is one operation for each kind of arithmetic; False would be
    # a loop over the parameters.
    fused = True if config.fused == "on" or (config.fused == "auto" and on_gpu) else None
    builders: Mapping[str, Callable[[], Optimizer]] = {
        "sgd": lambda: SGD(
            network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=fused,
        ),
        "adam": lambda: Adam(
            network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused
        ),
        "adamw": lambda: AdamW(
            network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused
        ),
    }
    return builders[config.name]()


@dataclass
class ScheduleStart:
    """Where a learning rate schedule starts.

    Attributes:
        epochs: the number of epochs that it lasts.
        step: the optimizer step at which it begins.
    """

    epochs: int
    step: int = 0


def build_schedule(
    config: ScheduleConfig, optimizer: Optimizer, start: ScheduleStart, steps_per_epoch: int
) -> LambdaLR:
    """Build the learning rate schedule; call its ``step`` after every optimizer step.  It follows
    later changes of ``start``."""
    warmup = config.warmup_epochs * steps_per_epoch
    milestones = [epoch * steps_per_epoch for epoch in config.milestones]

    def factor(step: int) -> float:
        step, total = step - start.step, start.epochs * steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.name == "cosine":
            progress = (step - warmup) / max(1, total - warmup)
            return (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return config.gamma ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)
