"""Loss guard: no further channel leaves while the training loss says that it hurts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

__all__ = ["Decision", "LossGuard"]

_WEIGHT_OF_NEWEST = 0.05
"""Of a step's loss in the smoothed one: about the last twenty steps count."""

_SHARE_OF_PROGRESS = 0.1
"""A loss may rise by this share of what it has fallen since training began, however small it is."""


class Decision(Enum):
    """What becomes of the channels that wait."""

    GO_ON = 0
    PAUSE = 1
    STOP = 2


class LossGuard:
    """Follows the loss of this rank, and judges the average of all ranks.

    Losses stay on their device until they are asked for.

    Args:
        pause_above: how many times its level at the elbow the loss may be.

    Attributes:
        limit: above which channels wait; infinite if there was no loss to follow.
        paused_at: the step since which no channel begins; None while they do.
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
        """Whether there was a loss to follow when channels began to leave."""
        return math.isfinite(self.limit)

    @torch.no_grad()
    def watch(self, loss: Tensor) -> None:
        """One forward pass's loss, a scalar on any device."""
        loss = loss.detach().float()
        self._step_sum = loss if self._step_sum is None else self._step_sum + loss
        self._step_count += 1

    @torch.no_grad()
    def after_step(self) -> None:
        """The passes since the last call were one step."""
        if self._step_sum is None:
            return
        newest = self._step_sum / self._step_count
        self._step_sum, self._step_count = None, 0
        if self._first is None or self._smoothed is None:
            self._first = self._smoothed = newest
        else:
            self._smoothed = torch.lerp(self._smoothed, newest, _WEIGHT_OF_NEWEST)

    def levels(self, device: torch.device) -> Tensor:
        """float32 ``[3]`` to be averaged over the ranks: the first loss, the smoothed one, and
        whether there is any."""
        if self._first is None or self._smoothed is None:
            return torch.zeros(3, device=device)
        return torch.stack([self._first, self._smoothed, torch.ones_like(self._first)]).to(device)

    def start(self, levels: Tensor) -> None:
        """Channels begin to leave.

        Args:
            levels: averaged.
        """
        first, level, watched = levels.tolist()
        self.paused_at = None
        self.limit = math.inf
        if watched == 1:
            progress = _SHARE_OF_PROGRESS * (first - level)
            self.limit = max(self._pause_above * level, level + progress)

    def decide(self, levels: Tensor, step: int, patience: int) -> Decision:
        """Whether further channels may begin, after this step.

        Args:
            levels: averaged.
            patience: steps of a pause after which none does any more.
        """
        # Written so that a NaN pauses too.
        if levels[1].item() <= self.limit:
            return Decision.GO_ON
        since = step if self.paused_at is None else self.paused_at
        return Decision.STOP if step - since >= patience else Decision.PAUSE

    def follow(self, decision: Decision, step: int) -> None:
        """What rank zero has decided after this step."""
        if decision is Decision.GO_ON:
            self.paused_at = None
        elif self.paused_at is None:
            self.paused_at = step

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on all ranks."""
        return {"limit": self.limit, "paused_at": self.paused_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.limit, self.paused_at = state["limit"], state["paused_at"]

    def losses_of_rank(self) -> list[float]:
        """What this rank has seen, for ``load_losses``: the first loss and the smoothed one, or
        nothing."""
        seen = (self._first, self._smoothed)
        return [float(loss) for loss in seen if loss is not None]

    def load_losses(self, losses: Sequence[float], device: torch.device) -> None:
        """Go on from what this rank has seen."""
        if losses:
            self._first, self._smoothed = (torch.tensor(x, device=device) for x in losses)
