"""Quiet console: nothing of a run but how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...verdict import Phase
from .console import Console
from .outcome import outcome

__all__ = ["QuietConsole"]


class QuietConsole(Console):
    """Prints one line at the end of a run, and why it has no result, if so."""

    def start(self, *args: Any, **settings: Any) -> None:
        """Start nothing: there is no progress bar."""

    def step(self, loss: float) -> None:
        pass

    def event(self, text: str, phase: Phase | None = None) -> None:
        pass

    def epoch(self, *args: Any, **figures: Any) -> None:
        pass

    def ending(self, text: str, phase: Phase | None = None) -> None:
        super().event(text)

    def summary(self, result: Mapping[str, Any], folder: Path) -> None:
        """Print the figures of the finished run in one line; see ``Console.summary``."""
        super().event(f"{folder}: {result['status']}; {'; '.join(outcome(result))}")
