"""Removal: begin to remove dropped channels on schedule, unless the loss guard pauses it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import SHORTEST_REMOVAL, RemovalConfig
from ..distributed.collectives import Communicator
from ..interval import Interval
from ..schema import Count, Schema
from .loss_guard import Decision, LossGuard, LossGuardSchema
from .removal_schedule import RemovalSchedule, RemovalScheduleSchema

__all__ = ["Removal", "RemovalSchema"]

logger = logging.getLogger(__name__)

_SHARE, _SHARE_LEFT = 0.2, 0.5
"""``duration: auto``: share of the training, and maximum share of what is left of the training when
removal starts.  From 5 to 60 % of the training no difference was beyond the spread
(docs/results/sweep); slower ones dip less and cost more FLOPs."""

_STEPS_BETWEEN_DECISIONS = 16
"""Optimizer steps for which a decision to go on is valid; each new decision is a collective."""


class RemovalSchema(Schema):
    """Schema of ``Removal.state_dict``."""

    schedule: RemovalScheduleSchema
    guard: LossGuardSchema
    patience: Count
    allowed_at: Count | None


class Removal:
    """Decides when which of the dropped channels begins to fade.

    Args:
        config: the settings of the removal.
        comm: the communicator of the data-parallel ranks.
        guard: the loss guard.
        num_steps: converts an interval to optimizer steps.
        total_steps: optimizer steps of the whole training; None if not known.
    """

    def __init__(
        self,
        config: RemovalConfig,
        comm: Communicator,
        guard: LossGuard,
        num_steps: Callable[[Interval], int],
        total_steps: int | None,
    ) -> None:
        self._config = config
        self._comm = comm
        self._guard = guard
        self._num_steps = num_steps
        self._total_steps = total_steps
        self._schedule = RemovalSchedule(config.fade_steps)
        self._patience = 0
        self._allowed_at: int | None = None

    @property
    def num_waiting(self) -> int:
        """Number of channels that have yet to begin to fade."""
        return self._schedule.waiting.numel()

    @property
    def is_paused(self) -> bool:
        """Whether the loss guard pauses the removal."""
        return self._guard.paused_at is not None

    def start(self, order: Tensor, step: int, device: torch.device) -> None:
        """Start to remove channels from this step on.  Collective.

        Args:
            order: int64 channel indices in the order of removal, agreed by the ranks.
            step: optimizer steps so far.
            device: the network's device.

        Raises:
            ConfigError: a setting is in epochs, whose length in steps is not known.
        """
        self._schedule.start(order, step, self._duration(step))
        self._guard.start(self._losses(device))
        if self._guard.watches:
            self._patience = self._num_steps(self._config.patience)
        self._allowed_at = None

    def stop(self) -> None:
        """Begin no other fade."""
        self._schedule.stop()

    def _duration(self, step: int) -> int:
        """The duration in optimizer steps.  ``auto`` has a minimum, because an epoch of few steps
        is too short to adapt to the missing channels."""
        duration, total_steps = self._config.duration, self._total_steps
        if isinstance(duration, Interval):
            return self._num_steps(duration)
        if total_steps is None:
            return max(self._num_steps(Interval(1, "ep")), SHORTEST_REMOVAL)
        share, left = _SHARE * total_steps, _SHARE_LEFT * (total_steps - step)
        return max(1, round(min(max(share, SHORTEST_REMOVAL), left)))

    def begin(self, step: int, device: torch.device) -> Tensor:
        """int64 indices of the channels that begin to fade after this step.  Collective if channels
        are due and the guard has a loss."""
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
        """Rank zero's decision, broadcast to all ranks."""
        guard, allowed_at = self._guard, self._allowed_at
        if not guard.watches or (
            allowed_at is not None and step - allowed_at < _STEPS_BETWEEN_DECISIONS
        ):
            return Decision.GO_ON
        losses = self._losses(device)

        def decide() -> Tensor:
            decision = guard.decide(losses, step, self._patience)
            return torch.tensor([decision.value], dtype=torch.float64)

        decision = Decision(int(self._comm.broadcast_from_rank0(decide, 1)))
        if self._comm.rank == 0:
            self._log_decision(decision, step, float(losses[1]))
        guard.follow(decision, step)
        self._allowed_at = step if decision is Decision.GO_ON else None
        return decision

    def _losses(self, device: torch.device) -> Tensor:
        """The guard's ``levels`` averaged over the ranks, on the CPU."""
        return self._comm.mean(self._guard.levels(device)).cpu()

    def _log_decision(self, decision: Decision, step: int, loss: float) -> None:
        message = f"step {step}: the training loss is {loss:.4g}, above {self._guard.limit:.4g}"
        if decision is Decision.PAUSE and not self.is_paused:
            logger.warning(
                "%s: removal of the remaining %d dropped channels pauses", message, self.num_waiting
            )
        elif decision is Decision.STOP:
            logger.warning(
                "%s, since step %s: the remaining %d dropped channels are kept; lower "
                "search.prune_ratio or the learning rate, or remove channels later or more slowly "
                "(search.elbow, truncation.removal.duration)",
                message,
                self._guard.paused_at,
                self.num_waiting,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values, the same on all ranks."""
        return {
            "schedule": self._schedule.state_dict(),
            "guard": self._guard.state_dict(),
            "patience": self._patience,
            "allowed_at": self._allowed_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._schedule.load_state_dict(state["schedule"])
        self._guard.load_state_dict(state["guard"])
        self._patience, self._allowed_at = state["patience"], state["allowed_at"]
