"""Decision: what the elbow rule and the settled rule say of the distances of the masks so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from ..config import SearchConfig
from .elbow import elbow_reached, elbow_threshold

__all__ = ["Decision", "decide", "mean"]


_MOST_CHANNELS = 10**7


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
    # The whole window has this many older masks; none may be further away than this (Early-Bird,
    # arXiv 1909.11957, section 4).
    settled = len(newest) == config.window - 1 and max(newest, default=0) <= config.settled
    return Decision(
        threshold=elbow_threshold(config, means),
        elbow=settled or elbow_reached(config, means),
        settled=settled,
    )


def mean(distances: Sequence[float]) -> float | None:
    """The mean of distances, the float that is nearest to the exact one; None before the second
    mask."""
    return _mean(tuple(distances)) if distances else None


@lru_cache(maxsize=2**14)  # every decision needs those of all checks before
def _mean(distances: tuple[float, ...]) -> float:
    # A distance is a fraction of channels.  Sums of floats would differ in the last bit, and so be
    # below a threshold that they equal, or not.
    exact = (Fraction(distance).limit_denominator(_MOST_CHANNELS) for distance in distances)
    return float(sum(exact) / len(distances))
