"""History: what the checks have seen so far, and what follows from it.  Rank zero's alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import SearchConfig
from .elbow import elbow_reached, elbow_threshold
from .mask import Mask
from .window import Window

__all__ = ["Finding", "History"]


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        step: optimizer steps before it.
        mask: cut at this check.
        distances: of the mask to the older ones in the window, oldest first.
        threshold: mean distance below which the elbow rule fires, None where it has none.
        elbow: truncation may start.
        settled: the ticket is found.
        floored: groups in which the floor spared a channel.
    """

    step: int
    mask: Mask
    distances: tuple[float, ...]
    threshold: float | None
    elbow: bool
    settled: bool
    floored: tuple[str, ...]

    @property
    def distance_mean(self) -> float | None:
        return sum(self.distances) / len(self.distances) if self.distances else None

    @property
    def distance_max(self) -> float | None:
        return max(self.distances, default=None)


class History:
    """All findings, oldest first, and the window over the newest masks."""

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._window = Window(config.window)
        self._findings: list[Finding] = []

    def record(self, step: int, mask: Mask, floored: tuple[str, ...]) -> Finding:
        """Judge the newest mask.  A settled mask is past its elbow, whatever the rule says."""
        self._window.push(mask)
        distances = self._window.distances
        means = [f.distance_mean for f in self._findings if f.distance_mean is not None]
        if distances:
            means.append(sum(distances) / len(distances))
        settled = self._window.settled(self._config.settled)
        finding = Finding(
            step=step,
            mask=mask,
            distances=distances,
            threshold=elbow_threshold(self._config, means),
            elbow=settled or elbow_reached(self._config, means),
            settled=settled,
            floored=floored,
        )
        self._findings.append(finding)
        return finding

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(self._findings)
