"""Elbow: the rules on the curve of mask distances that decide when truncation may start."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from ..config import SearchConfig
from ..ratio import exact

__all__ = ["elbow_reached", "elbow_threshold", "extras_of_rule"]

_MIN_POINTS_FOR_KNEE = 4


def extras_of_rule(config: SearchConfig) -> dict[str, str]:
    """The extras that the elbow rule needs, for ``require_extras``."""
    is_used = config.enabled and config.elbow.rule == "kneedle"
    return {"kneedle": "search.elbow.rule: 'kneedle'"} if is_used else {}


def elbow_reached(config: SearchConfig, means: Sequence[float]) -> bool:
    """Whether the curve has reached its elbow.

    Args:
        config: the search settings with the rule and its parameters.
        means: the mean distance of the newest mask to the older ones in the window, for every check
            from the second on.  The first one, which has none, is the elbow if
            ``search.elbow.min_masks`` is 1.
    """
    if len(means) + 1 < config.masks_before_elbow:
        return False
    return not means or _RULES[config.elbow.rule](config, means)


def elbow_threshold(config: SearchConfig, means: Sequence[float]) -> float | None:
    """Return the mean distance below which the rule fires; None for a rule without a threshold."""
    if config.elbow.rule == "margin":
        # In floats 0.1 + 0.05 is 0.15000000000000002, and a mean of 0.15 would be below it.
        return float(exact(config.settled) + exact(config.elbow.margin))
    if config.elbow.rule == "relative" and means:
        return config.elbow.fraction * max(means)
    return None


def _below_threshold(config: SearchConfig, means: Sequence[float]) -> bool:
    threshold = elbow_threshold(config, means)
    return threshold is not None and means[-1] < threshold


def _past_knee(config: SearchConfig, means: Sequence[float]) -> bool:
    """Whether kneed finds a knee before the newest point of the falling curve."""
    if len(means) < _MIN_POINTS_FOR_KNEE or max(means) == min(means):
        return False
    from kneed import KneeLocator  # imported here: loads pyplot and scipy, which takes seconds

    with warnings.catch_warnings():
        # kneed warns whenever a curve has no knee yet.
        warnings.simplefilter("ignore")
        found = KneeLocator(range(len(means)), means, curve="convex", direction="decreasing")
    return found.knee is not None and found.knee < len(means) - 1


_RULES: Mapping[str, Callable[[SearchConfig, Sequence[float]], bool]] = {
    "margin": _below_threshold,
    "relative": _below_threshold,
    "kneedle": _past_knee,
}
