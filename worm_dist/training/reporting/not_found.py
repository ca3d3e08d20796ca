"""Why a search has found no ticket, with the numbers that decided it and a remedy."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import SearchConfig
from ...search.convergence import CheckRecord
from ..run_config import RunConfig
from .result import Result

__all__ = ["why_not_found"]


def why_not_found(result: Result, config: RunConfig, history: Sequence[CheckRecord]) -> str:
    """Explain why a run ended before its draw.

    Args:
        result: the figures of the run.
        config: its settings.
        history: the records of all checks, oldest first; empty on all ranks but zero.
    """
    search = config.search
    if not history:
        reason = (
            f"no check in {config.epochs} epochs; search.every is {search.every}, so check more "
            "often, or train for more epochs"
        )
    elif result.removed_fraction is not None:
        reason = (
            f"truncation started at epoch {result.elbow_epoch:g}, and "
            f"{result.removed_fraction:.0%} of the dropped channels had been removed when training "
            "ended; raise epochs and --resume from the newest checkpoint, or set "
            "truncation.removal.duration lower"
        )
    elif result.elbow_epoch is not None:
        unsettled = _why_not_settled(search, history)
        reason = f"truncation started at epoch {result.elbow_epoch:g}, but {unsettled}"
    elif config.truncation.mode == "off":
        reason = _why_not_settled(search, history)
    else:
        reason = f"no elbow in {len(history)} checks: {_why_no_elbow(search, history)}"
    return f"no ticket: {reason}"


def _why_not_settled(search: SearchConfig, history: Sequence[CheckRecord]) -> str:
    newest = history[-1]
    num_masks = len(newest.distances) + 1
    if num_masks < search.window:
        return (
            f"the window has only {num_masks} of search.window's {search.window} masks; check more "
            "often (search.every), set search.window lower, or train for more epochs"
        )
    return (
        f"the masks have not settled: at the last check the largest distance was "
        f"{newest.distance_max:.3f}, and must not be above search.settled, {search.settled:g}; "
        "train for more epochs, or set search.settled higher"
    )


def _why_no_elbow(search: SearchConfig, history: Sequence[CheckRecord]) -> str:
    elbow, newest = search.elbow, history[-1]
    if len(history) < search.masks_before_elbow:
        return (
            f"no rule applies before search.elbow.min_masks, {elbow.min_masks}; check more often "
            "(search.every), set it lower, or train for more epochs"
        )
    if newest.threshold is None:
        return (
            f"the rule {elbow.rule} has found no knee in the mean distances, the last of which was "
            f"{newest.distance_mean:.3f}; train for more epochs, or choose another "
            "search.elbow.rule"
        )
    key = "margin" if elbow.rule == "margin" else "fraction"
    return (
        f"at the last one the mean distance of the masks was {newest.distance_mean:.3f}, and must "
        f"be below {newest.threshold:.3f}; train for more epochs, or set search.elbow.{key} higher"
    )
