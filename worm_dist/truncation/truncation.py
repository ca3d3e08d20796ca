"""Truncation: the generation in force, and what it does to gradients, traffic and weights."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..cluster.wrap import Bare, DataParallel
from ..config import TruncationConfig
from ..search.groups import Groups
from .ddp import PackedReduction, packed_allreduce
from .gradients import GradientHooks
from .motion import Fade, Free, Hold, Motion
from .plan import Plan

__all__ = ["Truncation"]


class _Gradients(Protocol):
    def adopt(self, plan: Plan) -> None: ...

    def remove(self) -> None: ...


class Truncation:
    """Frozen channels and everything that follows from them.

    Attributes:
        generation: how many sets of frozen channels have been in force.
        frozen: bool ``[num_channels]``, the channels frozen now.
        plan: the live and frozen parts of the parameters.
        motion: what the frozen parts do.
        reduction: state of the communication hook, None where none is needed.
    """

    def __init__(
        self,
        config: TruncationConfig,
        wrapping: Bare | DataParallel,
        optimizer: Optimizer,
        groups: Groups,
        fade_steps: int,
    ) -> None:
        self._config = config
        self._network = wrapping.network
        self._groups = groups
        self.motion = _motion(config, wrapping.network, optimizer, groups, fade_steps)
        self.generation = 0
        self.frozen = torch.zeros(groups.num_channels, dtype=torch.bool)
        self.plan = Plan(self._network, groups, self.frozen, config.scope)
        self.reduction: PackedReduction | None = None
        self._gradients: _Gradients
        if config.mode == "hard" and isinstance(wrapping, DataParallel):
            self.reduction = PackedReduction(wrapping.process_group)
            wrapping.model.register_comm_hook(self.reduction, packed_allreduce)
            self._gradients = self.reduction
        else:
            self._gradients = GradientHooks(0 if config.mode == "hard" else config.ratio)

    @property
    def live_fraction(self) -> float:
        """Live elements of all that train.  Soft truncation freezes nothing."""
        return self.plan.live_fraction if self._config.mode == "hard" else 1.0

    def adopt(self, frozen: Tensor, step: int) -> None:
        """Freeze other channels: those that fade already stay, others thaw."""
        self.generation += 1
        self.frozen = frozen | self.motion.lost
        self.plan = Plan(self._network, self._groups, self.frozen, self._config.scope)
        self._gradients.adopt(self.plan)
        self.motion.freeze(self.frozen, self.plan, step)

    def remove(self) -> None:
        """Leave gradients and weights alone from now on."""
        self._gradients.remove()


def _motion(
    config: TruncationConfig,
    network: nn.Module,
    optimizer: Optimizer,
    groups: Groups,
    fade_steps: int,
) -> Motion:
    if config.motion == "fade":
        return Fade(optimizer, network, groups, fade_steps)
    if config.motion == "hold":
        return Hold(optimizer, groups.num_channels)
    return Free(network, groups)
