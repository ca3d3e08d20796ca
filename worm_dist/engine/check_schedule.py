"""Check schedule: when checks are due, and how many optimizer steps an epoch has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import WormConfig
from ..errors import ConfigError
from ..interval import Interval
from ..schema import Count, Schema

__all__ = ["CheckSchedule", "CheckScheduleSchema", "require_countable"]


class CheckScheduleSchema(Schema):
    """Schema of ``CheckSchedule.state_dict``."""

    last_check: Count
    steps_per_epoch: Count | None


def require_countable(config: WormConfig) -> None:
    """Refuse settings for which ``steps_per_epoch`` must be given: it can only be counted between
    checks that are epochs apart.

    Raises:
        ConfigError: the length of an epoch is needed and cannot be counted.
    """
    truncation, every = config.truncation, config.search.every
    gradual = truncation.removes and truncation.removal.schedule == "gradual"
    duration = truncation.removal.duration
    in_epochs = not isinstance(duration, Interval) or duration.unit == "ep"
    if gradual and in_epochs and every.unit == "ba":
        raise ConfigError(
            "attach: truncation.removal.duration is in epochs, but search.every is not; give "
            "steps_per_epoch"
        )


class CheckSchedule:
    """When checks are due.

    Args:
        every: the interval between checks.
        steps_per_epoch: optimizer steps per epoch; None if they are counted between checks.
    """

    def __init__(self, every: Interval, steps_per_epoch: int | None) -> None:
        self._every = every
        self._steps_per_epoch = steps_per_epoch
        self._epoch_length_given = steps_per_epoch is not None
        self._last_check = 0

    def num_steps(self, interval: Interval) -> int:
        """Convert an interval to optimizer steps.

        Raises:
            ConfigError: it is in epochs, whose length is not known.
        """
        if interval.unit == "ep" and self._steps_per_epoch is None:
            raise ConfigError(
                f"the number of steps in {interval} is not known; give attach(steps_per_epoch=...)"
            )
        return interval.steps(self._steps_per_epoch or 1)

    def is_due(self, step: int) -> bool:
        """Whether the next check is due after this step.  Always true before the first step, and
        where checks are epochs apart and ``steps_per_epoch`` was not given."""
        if not step or (self._every.unit == "ep" and not self._epoch_length_given):
            return True
        return self.since_last(step) >= self.num_steps(self._every)

    def has_just_become_due(self, step: int) -> bool:
        """Whether this step has made the next check due; False if an epoch's length is not
        known."""
        if self._every.unit == "ep" and self._steps_per_epoch is None:
            return False
        return bool(step) and self.since_last(step) == self.num_steps(self._every)

    def since_last(self, step: int) -> int:
        """Optimizer steps since the last check."""
        return step - self._last_check

    def begin(self, step: int) -> None:
        """Record a check.  If ``steps_per_epoch`` was not given, it is inferred from the steps
        between the first two checks.

        Raises:
            ConfigError: there was only one step between them.
        """
        since_last = self.since_last(step)
        in_epochs = self._every.unit == "ep"
        if in_epochs and not self._epoch_length_given and since_last == 1:
            raise ConfigError(
                f"check: one step after the last one, and search.every is {self._every}. How "
                "many steps an epoch has is not known: give attach(steps_per_epoch=...), and check "
                "may be called after every step; or call it once an epoch"
            )
        self._last_check = step
        if in_epochs and self._steps_per_epoch is None and since_last:
            self._steps_per_epoch = max(1, round(since_last / self._every.count))

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values, the same on all ranks."""
        return {"last_check": self._last_check, "steps_per_epoch": self._steps_per_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._last_check = state["last_check"]
        self._steps_per_epoch = state["steps_per_epoch"]
