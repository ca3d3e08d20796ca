"""Decision: what the elbow rule and the settled rule say of the distances of the masks so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import SearchConfig
from .elbow import elbow_reached, elbow_threshold

__all__ = ["Decision", "decide", "mean"]


@dataclass(frozen=True)
class Decision:
    """What the rules say at a check.

    Attributes:
        threshold: the mean distance below which the elbow rule fires; None for rules without one.
        elbow: whether truncation may start; settled implies elbow.
        settled: whether the mask has settled, so that the ticket may be drawn.
    """

    threshold: float | None
    elbow: bool
    settled: bool


def decide(config: SearchConfig, curve: Sequence[Sequence[float]]) -> Decision:
    """Evaluate both rules at the newest check.

    Args:
        config: the settings of the search.
        curve: for every check so far, the distances of its mask to the older ones in the window,
            oldest first, 0 to 1; empty for the first check.
    """
    means = [average for distances in curve if (average := mean(distances)) is not None]
    newest = curve[-1]
    # The whole window has this many older masks (Early-Bird, arXiv 1909.11957, section 4).
    settled = len(newest) == config.window - 1 and max(newest) < config.settled
    return Decision(
        threshold=elbow_threshold(config, means),
        elbow=settled or elbow_reached(config, means),
        settled=settled,
    )


def mean(distances: Sequence[float]) -> float | None:
    """The mean of distances; None before the second mask."""
    return sum(distances) / len(distances) if distances else None
