"""Dashboard of a run in TensorBoard: the charts of its first page, and its row among other runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..run_config import RunConfig
from .result import Result

__all__ = [
    "CHARTS",
    "METRICS",
    "MOST_COMPARED",
    "OUTCOME",
    "SETTINGS",
    "VERDICTS",
    "final_scalars",
    "settings_that_matter",
]

VERDICTS, OUTCOME = "verdicts", "outcome"
"""Names of the cards of text: what was decided when, and what came out in the end."""


def _line(tag: str) -> str:
    """TensorBoard takes each name for a regular expression."""
    return f"^{re.escape(tag)}$"


CHARTS: Mapping[str, Mapping[str, list[str]]] = {
    "The run at a glance": {
        "Accuracy on the test split": [_line("test/accuracy")],
        "Bytes a step, and those of a dense step": [
            _line("traffic/sent_bytes_per_step"),
            _line("traffic/dense_bytes_per_step"),
        ],
        "Share: live gradients, removed channels": [
            _line("search/live_fraction"),
            _line("removal/removed_fraction"),
        ],
        "Mask distance (mean, largest), thresholds": [
            _line("search/distance_mean"),
            _line("search/distance_max"),
            _line("search/elbow_threshold"),
            _line("search/settled_threshold"),
        ],
    }
}
"""Names of curves by the chart's title, by the title of the page's section."""

SETTINGS = (
    "preset",
    "model.name",
    "data.name",
    "data.batch_size",
    "epochs",
    "optimizer.lr",
    "search.prune_ratio",
    "search.budget",
    "truncation.mode",
    "seed",
)
"""The settings by which runs are compared."""
MOST_COMPARED = ("preset", "model.name", "search.prune_ratio", "truncation.mode", "seed")
"""Those that TensorBoard shows unasked."""

METRICS: Mapping[str, str] = {
    "test/accuracy": "accuracy",
    "compute/parameters": "parameters",
    "compute/flops_per_sample": "FLOPs a sample",
    "traffic/sent_bytes_per_step": "bytes a step",
    "traffic/total_bytes": "bytes of the run",
    "whole_run/seconds": "seconds",
    "whole_run/elbow_epoch": "elbow at epoch",
    "whole_run/ticket_epoch": "ticket at epoch",
}
"""Heading by the name of the curve whose last value is the figure."""


def settings_that_matter(config: RunConfig) -> dict[str, Any]:
    """``SETTINGS`` of a run; those that have no effect in it are None."""
    flat = config.flat()
    budget = config.search.budget.chosen
    flat["search.budget"] = None if budget is None else f"{budget[0]} {budget[1]:g}"
    if budget is not None:
        flat["search.prune_ratio"] = None
    if not config.search.enabled:
        flat |= {"search.prune_ratio": None, "search.budget": None}
    return {key: flat[key] for key in SETTINGS}


def final_scalars(result: Result) -> dict[str, float]:
    """The figures of ``METRICS`` that are known at the end only, as far as the run has them.

    TensorBoard draws a chart of a single point for each; the prefix sorts them last.
    """
    figures = {
        "whole_run/seconds": result.seconds.total,
        "whole_run/elbow_epoch": result.elbow_epoch,
        "whole_run/ticket_epoch": result.ticket_epoch,
    }
    return {name: float(value) for name, value in figures.items() if value is not None}
