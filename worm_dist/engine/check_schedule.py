"""Check schedule: when checks are due, when truncation starts at the latest, and how many optimizer
steps an epoch and the whole training have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..config import AUTO_LATEST, WormConfig
from ..errors import ConfigError
from ..interval import Interval
from ..schema import Count, Schema

__all__ = ["CheckSchedule", "CheckScheduleSchema", "require_countable"]


class CheckScheduleSchema(Schema):
    """Schema of ``CheckSchedule.state_dict``."""

    last_check: Count
    steps_per_epoch: Count | None


def require_countable(
    config: WormConfig, steps_per_epoch: int | None, total_steps: int | None
) -> None:
    """Refuse settings for which ``steps_per_epoch`` or ``total_steps`` must be given.  An epoch can
    be counted between checks that are epochs apart.

    Raises:
        ConfigError: a length is needed, is not given and cannot be counted.
    """
    search, truncation = config.search, config.truncation
    removal = truncation.removal
    needed: list[tuple[str, Interval | str | None]] = [("search.every", search.every)]
    if truncation.mode != "off":
        needed.append(("search.elbow.latest", search.elbow.latest))
    if truncation.removes and removal.schedule == "gradual":
        in_epochs = removal.duration == "auto" and total_steps is None
        duration = Interval(1, "ep") if in_epochs else removal.duration
        needed.append(("truncation.removal.duration", duration))
    counts_epochs = steps_per_epoch is not None or search.every.unit == "ep"
    for key, interval in needed:
        if not isinstance(interval, Interval):
            continue
        if interval.unit == "dur" and total_steps is None:
            raise ConfigError(
                f"attach: {key} is {interval}, a share of the training; give total_steps"
            )
        if interval.unit == "ep" and not counts_epochs:
            raise ConfigError(
                f"attach: {key} is in epochs, but search.every is not; give steps_per_epoch"
            )


class CheckSchedule:
    """When checks are due.

    Args:
        every: the interval between checks.
        steps_per_epoch: optimizer steps per epoch; None if they are counted between checks.
        total_steps: optimizer steps of the whole training; None if not known.

    Attributes:
        total_steps: as given.
    """

    def __init__(
        self, every: Interval, steps_per_epoch: int | None, total_steps: int | None
    ) -> None:
        self.total_steps = total_steps
        self._every = every
        self._steps_per_epoch = steps_per_epoch
        self._epoch_length_given = steps_per_epoch is not None
        self._last_check = 0

    def num_steps(self, interval: Interval) -> int:
        """Convert an interval to optimizer steps.

        Raises:
            ConfigError: the length of its unit is not known.
        """
        try:
            return interval.steps(self._steps_per_epoch, self.total_steps)
        except ValueError as error:
            name = "steps_per_epoch" if interval.unit == "ep" else "total_steps"
            raise ConfigError(f"{error}; give attach({name}=...)") from None

    def is_latest_start(self, latest: Interval | Literal["auto"] | None, step: int) -> bool:
        """Whether truncation starts after this step even without an elbow.

        Args:
            latest: ``search.elbow.latest``.
            step: optimizer steps so far.
        """
        if latest is None or not step or (latest == "auto" and self.total_steps is None):
            return False
        return step >= self.num_steps(AUTO_LATEST if latest == "auto" else latest)

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
