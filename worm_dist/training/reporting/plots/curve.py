"""The curve of distances that decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ....search.convergence import CheckRecord
from .common import new_figure, newest, thinned, title

# Of the palette of Okabe and Ito, which the colour-blind tell apart.
_MEAN, _MAX, _SETTLED, _ELBOW = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
_MOST_POINTS = 40
_HEADROOM = 1.3
"""Of the curve, for words above it."""

_Lines = dict[str, tuple[str, list[float | None]]]
"""Name of a line -> its colour, its height at every check."""

__all__ = ["distance_curve"]


def distance_curve(findings: Sequence[CheckRecord], settled: float) -> Figure:
    """Mean and largest distance of each mask to the older ones in its window.

    Args:
        findings: oldest first.
        settled: the distance, 0 to 1, below which masks count as settled.

    Raises:
        ValueError: there is no finding.
    """
    last = newest(findings)[-1]
    figure, axes = new_figure(8.0, 4.8)
    distances: _Lines = {
        "mean": (_MEAN, [f.distance_mean for f in findings]),
        "largest": (_MAX, [f.distance_max for f in findings]),
    }
    thresholds: _Lines = {
        "elbow threshold": (_ELBOW, [f.threshold for f in findings]),
        "settled threshold": (_SETTLED, [settled] * len(findings)),
    }
    for colour, values in distances.values():
        marker = "o" if len(findings) <= _MOST_POINTS else ""
        _draw(axes, values, color=colour, linewidth=2, marker=marker, markersize=4)
    for colour, values in thresholds.values():
        # One place more: a threshold holds until the next check, and a single one is a line too.
        _draw(axes, [*values, values[-1]], color=colour, linestyle="--", drawstyle="steps-post")
    lines = {**distances, **thresholds}
    top = max(value for _, values in lines.values() for value in values if value is not None)
    axes.set_ylim(0, _HEADROOM * top)
    axes.set_xlim(0.5, len(findings) + 1)
    _label_ends(axes, {name: (colour, values[-1]) for name, (colour, values) in lines.items()})
    _mark_verdicts(axes, findings)
    axes.grid(axis="y", color="#E6E6E6")
    axes.set_axisbelow(True)
    axes.set_xticks([index + 1 for index in thinned(len(findings))])
    axes.set_xlabel(f"check (the newest after {last.step:,} optimizer steps)")
    axes.set_ylabel("distance to the older masks in the window")
    title(
        axes,
        "How much the mask still changes",
        "from the elbow on gradients may be truncated; settled masks are the ticket"
        if last.distances
        else "the first check has no older mask to compare with",
    )
    return figure


def _spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Positions near the wanted ones, ``gap`` apart in the same order, none above ``top``."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    limit = top
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _draw(axes: Axes, values: Sequence[float | None], **style: Any) -> None:
    """A line over the numbers of the checks, from 1 on, with gaps for None."""
    heights = [np.nan if value is None else value for value in values]
    axes.plot(range(1, len(heights) + 1), heights, **style)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[str, float | None]]) -> None:
    """Each line's name beside its newest point, moved where two would overlap."""
    present = {name: (colour, y) for name, (colour, y) in ends.items() if y is not None}
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    heights = _spread([y for _, y in present.values()], gap=0.055 * top, top=top)
    for (name, (colour, y)), height in zip(present.items(), heights):
        axes.annotate(
            f"{name} {y:.3g}",
            (right, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _mark_verdicts(axes: Axes, findings: Sequence[CheckRecord]) -> None:
    """Where truncation may start and where the ticket is found, each explained in the headroom."""
    elbow = next((i for i, finding in enumerate(findings, 1) if finding.elbow), None)
    settled = next((i for i, finding in enumerate(findings, 1) if finding.settled), None)
    for word, check, colour, height in (
        ("elbow", elbow, _ELBOW, 0.96),
        ("settled", settled, _SETTLED, 0.88),
    ):
        if check is not None:
            _mark(axes, word, check, findings, colour, height * axes.get_ylim()[1])


def _mark(
    axes: Axes, word: str, check: int, findings: Sequence[CheckRecord], colour: str, height: float
) -> None:
    finding = findings[check - 1]
    late = check > len(findings) / 2
    axes.vlines(check, 0, height, color=colour, linewidth=1, alpha=0.5)
    if finding.distance_mean is not None:
        axes.plot(check, finding.distance_mean, "o", color=colour, markersize=8)
    axes.annotate(
        f"{word}: check {check}, step {finding.step:,}",
        (check, height),
        xytext=(-5 if late else 5, 0),
        textcoords="offset points",
        ha="right" if late else "left",
        va="center",
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
