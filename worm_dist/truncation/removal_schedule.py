"""Removal schedule: the step at which each dropped channel begins to fade.

Removing all channels at once destroys networks: the following norm rescales what is left, so the
network keeps depending on the fading channels until they are zero.  Removed one after another, the
network adapts to each missing channel before the next one fades.  Many go at first, when many are
redundant, and fewer and fewer later: the cubic schedule of gradual pruning (Zhu and Gupta 2017,
arXiv 1710.01878, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..schema import Count, Integers, Schema

__all__ = ["RemovalSchedule", "RemovalScheduleSchema"]


class RemovalScheduleSchema(Schema):
    """Schema of ``RemovalSchedule.state_dict``."""

    waiting: Integers
    num_begun: Count
    began_at: Count
    duration: Count


class RemovalSchedule:
    """Channels in the order of their removal, with a cubic schedule.

    It depends only on what the ranks have agreed on, so it needs no communication.

    Args:
        fade_steps: optimizer steps of a channel's fade.

    Attributes:
        waiting: int64 indices of the channels that have yet to begin to fade, in order.
    """

    def __init__(self, fade_steps: int) -> None:
        self.waiting = torch.empty(0, dtype=torch.int64)
        self._fade_steps = fade_steps
        self._num_begun = 0
        self._began_at = 0
        self._duration = 0

    def start(self, order: Tensor, step: int, duration: int) -> None:
        """Start to remove channels from this step on.

        Args:
            order: int64 channel indices in the order of removal.
            step: optimizer steps so far.
            duration: optimizer steps within which the last fade ends.
        """
        self.waiting = order
        self._num_begun, self._began_at, self._duration = 0, step, duration

    def pause(self, num_steps: int) -> None:
        """Delay the rest of the schedule."""
        self._began_at += num_steps

    def stop(self) -> None:
        """Keep all waiting channels."""
        self.waiting = self.waiting[:0]

    def is_due(self, step: int) -> bool:
        """Whether channels begin to fade after this step."""
        return self._num_due(step) > 0

    def begin(self, step: int) -> Tensor:
        """Remove from ``waiting``, and return, the channels that begin to fade after this step,
        int64."""
        num_due = self._num_due(step)
        begin, self.waiting = self.waiting[:num_due], self.waiting[num_due:]
        self._num_begun += num_due
        return begin

    def _num_due(self, step: int) -> int:
        """Number of channels that begin to fade after this step; one batch every ``fade_steps``."""
        num_waiting = self.waiting.numel()
        since = step - self._began_at
        if not num_waiting or since < 0 or since % self._fade_steps:
            return 0
        last = max(0, self._duration - self._fade_steps) // self._fade_steps * self._fade_steps
        share_left = 1 - (since + self._fade_steps) / (last + self._fade_steps)
        num_in_all = self._num_begun + num_waiting
        num_wanted = round(num_in_all * (1 - max(0.0, share_left) ** 3))
        return max(0, min(num_waiting, num_wanted - self._num_begun))

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values."""
        return {
            "waiting": self.waiting.clone(),
            "num_begun": self._num_begun,
            "began_at": self._began_at,
            "duration": self._duration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.waiting = state["waiting"].to("cpu", copy=True)
        self._num_begun, self._began_at = state["num_begun"], state["began_at"]
        self._duration = state["duration"]
