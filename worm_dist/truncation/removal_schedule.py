"""Removal schedule: when which of the dropped channels begins to leave.

All at once destroys networks: the norm behind them divides by the spread of what arrives, so the
network goes on living on the fading channels until they are zero, and then all is lost.  One after
another, each has been learnt to be done without before the next one goes.  Many go at first, when
there are many to do without, and fewer and fewer later: the cubic schedule of gradual pruning (Zhu
and Gupta 2017, arXiv 1710.01878, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["RemovalSchedule"]


class RemovalSchedule:
    """Channels in the order in which they leave, and the pace.

    It follows from masks that are agreed, so that no rank has to be told when a channel begins.

    Args:
        fade_steps: optimizer steps from the beginning of a channel to its end.

    Attributes:
        waiting: int64, the channels that have yet to begin, the first to begin first.
    """

    def __init__(self, fade_steps: int) -> None:
        self.waiting = torch.empty(0, dtype=torch.int64)
        self._fade_steps = fade_steps
        self._num_begun = 0
        self._began_at = 0
        self._duration = 0

    def start(self, order: Tensor, step: int, duration: int) -> None:
        """These channels leave from this step on, the last one before ``duration`` is over."""
        self.waiting = order
        self._num_begun, self._began_at, self._duration = 0, step, duration

    def pause(self, num_steps: int) -> None:
        """Everything that is still to come comes later."""
        self._began_at += num_steps

    def stop(self) -> None:
        """No further channel leaves."""
        self.waiting = self.waiting[:0]

    def is_due(self, step: int) -> bool:
        """Whether channels begin after this step."""
        return self._num_due(step) > 0

    def begin(self, step: int) -> Tensor:
        """The channels that begin after this step, int64; they wait no longer."""
        num_due = self._num_due(step)
        begin, self.waiting = self.waiting[:num_due], self.waiting[num_due:]
        self._num_begun += num_due
        return begin

    def _num_due(self, step: int) -> int:
        """With every fade the next ones begin."""
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
        """Plain values."""
        return {
            "waiting": self.waiting.clone(),
            "num_begun": self._num_begun,
            "began_at": self._began_at,
            "duration": self._duration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.waiting = state["waiting"].to("cpu", copy=True)
        self._num_begun, self._began_at = state["num_begun"], state["began_at"]
        self._duration = state["duration"]
