"""Unwritten: what a run could not write down.  It trains on all the same, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...errors import CheckpointError

__all__ = ["FailedWrites"]

logger = logging.getLogger(__name__)


class FailedWrites:
    """Names of what is missing or ends early, in the order in which it was lost."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return list(self._reasons)

    def __contains__(self, name: str) -> bool:
        return name in self._reasons

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self._reasons.items())

    def spare(self, name: str, write: Callable[..., object], *args: Any) -> None:
        """Call ``write(*args)``, unless an earlier call for that name failed; warn of the first
        failure."""
        if name in self:
            return
        try:
            write(*args)
        except (OSError, CheckpointError) as error:
            self.note(name, getattr(error, "strerror", None) or str(error))
            logger.warning(
                "%s cannot be written (%s); training goes on without it", name, self._reasons[name]
            )

    def note(self, name: str, reason: str) -> None:
        """Something else has been lost, and said so by itself."""
        self._reasons.setdefault(name, reason)
