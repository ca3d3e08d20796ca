"""Elbow: the rules by which the curve of mask distances says that truncation may start."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from ..config import SearchConfig

__all__ = ["elbow_reached", "elbow_threshold"]

_FEWEST_POINTS_FOR_A_KNEE = 4


def elbow_reached(config: SearchConfig, means: Sequence[float]) -> bool:
    """Whether the curve has reached its elbow.

    Args:
        config: the rule and its numbers.
        means: for every check from the second on, the mean distance of the newest mask to the
            older ones in the window.
    """
    num_masks = len(means) + 1
    return num_masks >= config.elbow.min_masks and _RULES[config.elbow.rule](config, means)


def elbow_threshold(config: SearchConfig, means: Sequence[float]) -> float | None:
    """The mean distance below which the rule fires; None for a rule without a threshold."""
    if config.elbow.rule == "margin":
        return config.settled + config.elbow.margin
    if config.elbow.rule == "relative" and means:
        return config.elbow.fraction * max(means)
    return None


def _below_threshold(config: SearchConfig, means: Sequence[float]) -> bool:
    threshold = elbow_threshold(config, means)
    return threshold is not None and means[-1] < threshold


def _past_the_knee(config: SearchConfig, means: Sequence[float]) -> bool:
    """Whether kneed finds a knee before the newest point of the falling curve."""
    if len(means) < _FEWEST_POINTS_FOR_A_KNEE or max(means) == min(means):
        return False
    from kneed import KneeLocator  # only here: it takes seconds, with all of pyplot and scipy

    with warnings.catch_warnings():
        # Most curves have no knee yet when they are asked; kneed warns each time.
        warnings.simplefilter("ignore")
        found = KneeLocator(range(len(means)), means, curve="convex", direction="decreasing")
    return found.knee is not None and found.knee < len(means) - 1


_RULES: Mapping[str, Callable[[SearchConfig, Sequence[float]], bool]] = {
    "margin": _below_threshold,
    "relative": _below_threshold,
    "kneedle": _past_the_knee,
}
