"""Loss guard: pauses the removal of channels while the training loss is too high."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..backends.optimizer_view import StepListener
from ..schema import Count, Schema

__all__ = ["Decision", "LossGuard", "LossGuardSchema"]

_WEIGHT_OF_NEWEST = 0.05
"""Weight of the newest step in the smoothed loss: about the last twenty steps count."""

_SHARE_OF_PROGRESS = 0.1
"""The loss may rise at least by this share of its decrease since training began."""


class Decision(Enum):
    """Whether waiting channels are removed: yes, not for now, or not at all."""

    GO_ON = 0
    PAUSE = 1
    STOP = 2


class LossGuardSchema(Schema):
    """Schema of ``LossGuard.state_dict``."""

    limit: Annotated[float, Field(gt=-math.inf)]  # which NaN is not
    paused_at: Count | None


class LossGuard(StepListener):
    """Smooths this rank's loss, and compares the average over all ranks with a limit.

    Losses stay on their device until ``levels`` is called.

    Args:
        pause_above: the limit, as a multiple of the loss at the elbow.

    Attributes:
        limit: the loss above which removal pauses; infinite without ``watch``.
        paused_at: the step since which removal is paused; None if it is not.
    """

    def __init__(self, pause_above: float) -> None:
        self._pause_above = pause_above
        self._step_sum: Tensor | None = None
        self._step_count = 0
        self._first: Tensor | None = None
        self._smoothed: Tensor | None = None
        self.limit = math.inf
        self.paused_at: int | None = None

    @property
    def watches(self) -> bool:
        """Whether every rank had given a loss when the removal began."""
        return math.isfinite(self.limit)

    @torch.no_grad()
    def watch(self, loss: Tensor) -> None:
        """Record the loss of one forward pass, a scalar on any device."""
        loss = loss.detach().float()
        self._step_sum = loss if self._step_sum is None else self._step_sum + loss
        self._step_count += 1

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Smooth the mean loss of the passes since the step before."""
        if self._step_sum is None:
            return
        newest = self._step_sum / self._step_count
        self._step_sum, self._step_count = None, 0
        if self._first is None or self._smoothed is None:
            self._first = self._smoothed = newest
        else:
            self._smoothed = torch.lerp(self._smoothed, newest, _WEIGHT_OF_NEWEST)

    def levels(self, device: torch.device) -> Tensor:
        """float32 ``[3]``, to be averaged over the ranks: the first loss, the smoothed loss, and 1
        if there is any loss, else zeros."""
        if self._first is None or self._smoothed is None:
            return torch.zeros(3, device=device)
        return torch.stack([self._first, self._smoothed, torch.ones_like(self._first)]).to(device)

    def start(self, levels: Tensor) -> None:
        """Set the limit as the removal begins.

        Args:
            levels: float32 ``[3]``, ``levels`` averaged over the ranks.
        """
        first, level, watched = levels.tolist()
        self.paused_at = None
        self.limit = math.inf
        if watched == 1:
            progress = _SHARE_OF_PROGRESS * (first - level)
            self.limit = max(self._pause_above * level, level + progress)

    def decide(self, levels: Tensor, step: int, patience: int) -> Decision:
        """Whether further channels may be removed after this step.

        Args:
            levels: float32 ``[3]``, ``levels`` averaged over the ranks.
            step: optimizer steps so far.
            patience: optimizer steps of a pause after which removal stops for good.
        """
        # The comparison is false for a NaN, which therefore pauses.
        if levels[1].item() <= self.limit:
            return Decision.GO_ON
        since = step if self.paused_at is None else self.paused_at
        return Decision.STOP if step - since >= patience else Decision.PAUSE

    def follow(self, decision: Decision, step: int) -> None:
        """Apply rank zero's decision after this step."""
        if decision is Decision.GO_ON:
            self.paused_at = None
        elif self.paused_at is None:
            self.paused_at = step

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values, the same on all ranks."""
        return {"limit": self.limit, "paused_at": self.paused_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.limit, self.paused_at = state["limit"], state["paused_at"]

    def rank_state(self) -> list[float]:
        """This rank's first and smoothed loss; empty if there is none."""
        losses = (self._first, self._smoothed)
        return [float(loss) for loss in losses if loss is not None]

    def load_rank_state(self, losses: Sequence[float], device: torch.device) -> None:
        """Restore a state of ``rank_state``."""
        if losses:
            self._first, self._smoothed = (torch.tensor(x, device=device) for x in losses)
