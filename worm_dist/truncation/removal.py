"""Removal: dropped channels leave as they are scheduled, while the loss allows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import RemovalConfig
from ..distributed.collectives import Communicator
from ..interval import Interval
from .loss_guard import Decision, LossGuard
from .removal_schedule import RemovalSchedule

__all__ = ["Removal"]

logger = logging.getLogger(__name__)

_SHORTEST = 100
"""Steps of a removal, whatever an epoch has, if nobody says otherwise."""

_STEPS_BETWEEN_QUESTIONS = 16
"""How long further channels may begin once the loss has allowed it; a question is a collective."""


class Removal:
    """What becomes of the channels that are to leave.

    Args:
        config: of it.
        ranks: that train together.
        guard: follows the loss.
        num_steps: of an interval.
    """

    def __init__(
        self,
        config: RemovalConfig,
        ranks: Communicator,
        guard: LossGuard,
        num_steps: Callable[[Interval], int],
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._guard = guard
        self._num_steps = num_steps
        self._schedule = RemovalSchedule(config.fade_steps)
        self._patience = 0
        self._allowed_at: int | None = None

    @property
    def num_waiting(self) -> int:
        """Channels that have yet to begin."""
        return self._schedule.waiting.numel()

    @property
    def is_paused(self) -> bool:
        """Whether channels wait because of the loss."""
        return self._guard.paused_at is not None

    def start(self, order: Tensor, step: int, losses: Tensor) -> None:
        """These channels leave from this step on.

        Args:
            order: int64, the first to leave first; agreed.
            step: optimizer steps so far.
            losses: what the guard asks for, averaged over the ranks.

        Raises:
            ConfigError: a setting is in epochs, and it is not known how many steps one has.
        """
        self._schedule.start(order, step, self._duration())
        self._guard.start(losses)
        if self._guard.watches:
            self._patience = self._num_steps(self._config.patience)
        self._allowed_at = None

    def _duration(self) -> int:
        """In steps.  What a network can do without it learns in steps, not in epochs: in an epoch
        of twenty it has learnt too little."""
        duration = self._config.duration
        if isinstance(duration, Interval):
            return self._num_steps(duration)
        return max(self._num_steps(Interval(1, "ep")), _SHORTEST)

    def begin(self, step: int, device: torch.device) -> Tensor:
        """The channels, int64, that begin to leave after this step.  Collective if channels are due
        and there is a loss to follow."""
        if not self._schedule.is_due(step):
            return self._schedule.waiting[:0]
        decision = self._decision(step, device)
        if decision is Decision.GO_ON:
            return self._schedule.begin(step)
        if decision is Decision.PAUSE:
            self._schedule.pause(self._config.fade_steps)
        else:
            self._schedule.stop()
        return self._schedule.waiting[:0]

    def _decision(self, step: int, device: torch.device) -> Decision:
        """Rank zero's, on all ranks."""
        guard, allowed_at = self._guard, self._allowed_at
        if not guard.watches or (
            allowed_at is not None and step - allowed_at < _STEPS_BETWEEN_QUESTIONS
        ):
            return Decision.GO_ON
        losses = self._ranks.mean(guard.levels(device))

        def decide() -> Tensor:
            decision = guard.decide(losses, step, self._patience)
            return torch.tensor([decision.value], dtype=torch.float64)

        decision = Decision(int(self._ranks.decided_by_rank_zero(decide, 1)))
        if self._ranks.rank == 0:
            self._tell(decision, step, float(losses[1]))
        guard.follow(decision, step)
        self._allowed_at = step if decision is Decision.GO_ON else None
        return decision

    def _tell(self, decision: Decision, step: int, loss: float) -> None:
        words = f"step {step}: the training loss is {loss:.4g}, above {self._guard.limit:.4g}"
        if decision is Decision.PAUSE and not self.is_paused:
            logger.warning("%s: %d dropped channels wait", words, self.num_waiting)
        elif decision is Decision.STOP:
            logger.warning(
                "%s, since step %s: the %d dropped channels that wait stay; lower "
                "search.prune_ratio or the learning rate, or let channels leave later or slower "
                "(search.elbow, truncation.removal.duration)",
                words,
                self._guard.paused_at,
                self.num_waiting,
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on all ranks."""
        return {
            "schedule": self._schedule.state_dict(),
            "guard": self._guard.state_dict(),
            "patience": self._patience,
            "allowed_at": self._allowed_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._schedule.load_state_dict(state["schedule"])
        self._guard.load_state_dict(state["guard"])
        self._patience, self._allowed_at = state["patience"], state["allowed_at"]
