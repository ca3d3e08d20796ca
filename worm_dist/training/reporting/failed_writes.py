"""Record of output files that could not be written while training continued."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...errors import CheckpointError

__all__ = ["FailedWrites"]

logger = logging.getLogger(__name__)


class FailedWrites:
    """Names and reasons of missing or truncated outputs, in the order of their failure."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return list(self._reasons)

    def __contains__(self, name: str) -> bool:
        return name in self._reasons

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self._reasons.items())

    def best_effort(self, name: str, write: Callable[..., object], *args: Any) -> None:
        """Call ``write(*args)`` and record a failure instead of raising it.

        After the first failure of a name, which is logged as a warning, later calls are skipped.

        Args:
            name: name of the output.
            write: the function that writes it.
            *args: arguments of ``write``.
        """
        if name in self:
            return
        try:
            write(*args)
        except (OSError, CheckpointError) as error:
            self.record(name, getattr(error, "strerror", None) or str(error))
            logger.warning(
                "%s cannot be written (%s); training goes on without it", name, self._reasons[name]
            )

    def record(self, name: str, reason: str) -> None:
        """Record a failure that has been logged elsewhere."""
        self._reasons.setdefault(name, reason)
