"""History: what the checks have seen so far, and what follows from it.  Rank zero's alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import SearchConfig
from .elbow import elbow_reached, elbow_threshold
from .mask import Mask
from .window import Window

__all__ = ["CheckRecord", "History"]


@dataclass(frozen=True)
class CheckRecord:
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
        self._findings: list[CheckRecord] = []

    def record(self, step: int, mask: Mask, floored: tuple[str, ...]) -> CheckRecord:
        """Judge the newest mask.  A settled mask is past its elbow, whatever the rule says."""
        self._window.push(mask)
        distances = self._window.distances
        means = [f.distance_mean for f in self._findings if f.distance_mean is not None]
        if distances:
            means.append(sum(distances) / len(distances))
        settled = self._window.settled(self._config.settled)
        finding = CheckRecord(
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

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the masks, bool ``[checks, candidates]``, and what was found at each."""
        masks = [finding.mask for finding in self._findings]
        plain = ("step", "distances", "threshold", "elbow", "settled", "floored")
        return {
            "sizes": masks[0].sizes if masks else {},
            "masks": torch.stack([m.keep for m in masks]) if masks else torch.empty(0, 0).bool(),
            "findings": [{key: getattr(f, key) for key in plain} for f in self._findings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the window follows from the newest masks."""
        masks = [Mask.from_vector(state["sizes"], keep) for keep in state["masks"]]
        self._findings = [
            CheckRecord(mask=mask, **finding)
            for mask, finding in zip(masks, state["findings"], strict=True)
        ]
        self._window = Window(self._config.window, masks)

    @property
    def findings(self) -> tuple[CheckRecord, ...]:
        return tuple(self._findings)
