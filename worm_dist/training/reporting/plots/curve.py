"""Plot of the mask distances with the thresholds for the elbow and for settled masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .common import FONT_SIZE, WIDTH, CheckDistances, new_figure, newest, thinned, title

# From the colour-blind safe palette of Okabe and Ito.
_MEAN, _MAX, _SETTLED, _ELBOW = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
_MOST_POINTS = 40
_HEADROOM = 1.3
"""Height of the axes relative to the curve; leaves room for annotations above it."""

_Lines = dict[str, tuple[str, list[float | None]]]
"""Colour and value at every check, by the line's name."""

__all__ = ["distance_curve"]


def distance_curve(records: Sequence[CheckDistances], settled: float | None) -> Figure:
    """Plot the mean and largest distance of each mask to the older ones in its window.

    Args:
        records: the records of all checks, oldest first.
        settled: the distance, 0 to 1, below which masks count as settled; None if it is not known.

    Raises:
        ValueError: there are no records.
    """
    last = newest(records)[-1]
    figure, axes = new_figure(WIDTH, 3.7)
    distances: _Lines = {
        "mean": (_MEAN, [record.distance_mean for record in records]),
        "largest": (_MAX, [record.distance_max for record in records]),
    }
    thresholds: _Lines = {
        "elbow below": (_ELBOW, [record.threshold for record in records]),
        "settled below": (_SETTLED, [settled] * len(records)),
    }
    for colour, values in distances.values():
        marker = "o" if len(records) <= _MOST_POINTS else ""
        _draw(axes, values, color=colour, linewidth=2, marker=marker, markersize=4)
    for colour, values in thresholds.values():
        # A threshold applies until the next check, so its line is one check longer.
        _draw(axes, [*values, values[-1]], color=colour, linestyle="--", drawstyle="steps-post")
    lines = {**distances, **thresholds}
    top = max(value for _, values in lines.values() for value in values if value is not None)
    axes.set_ylim(0, _HEADROOM * top)
    axes.set_xlim(0.5, len(records) + 1)
    _label_ends(axes, {name: (colour, values[-1]) for name, (colour, values) in lines.items()})
    _mark_verdicts(axes, records)
    axes.grid(axis="y", color="#E6E6E6")
    axes.set_axisbelow(True)
    axes.set_xticks([index + 1 for index in thinned(len(records))])
    axes.set_xlabel(f"check; the newest after step {last.step:,}", fontsize=FONT_SIZE)
    title(
        axes,
        "How much the mask still changes",
        "distance to the older masks in the window"
        if last.distances
        else "the first check has no older mask",
    )
    return figure


def _spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Move positions apart by at least ``gap``, keeping their order, none above ``top``."""
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
    """Plot values over check numbers, counted from 1, with gaps for None."""
    heights = [np.nan if value is None else value for value in values]
    axes.plot(range(1, len(heights) + 1), heights, **style)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[str, float | None]]) -> None:
    """Write each line's name beside its newest point, moved apart where they would overlap."""
    present = {name: (colour, y) for name, (colour, y) in ends.items() if y is not None}
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    heights = _spread([y for _, y in present.values()], gap=0.085 * top, top=top)
    for (name, (colour, y)), height in zip(present.items(), heights):
        axes.annotate(
            f"{name} {y:.3g}",
            (right, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=FONT_SIZE,
            annotation_clip=False,
        )


def _mark_verdicts(axes: Axes, records: Sequence[CheckDistances]) -> None:
    """Mark the checks of the elbow and of the first settled masks, annotated above the curve."""
    elbow = next((i for i, record in enumerate(records, 1) if record.elbow), None)
    settled = next((i for i, record in enumerate(records, 1) if record.settled), None)
    for label, check, colour, height in (
        ("elbow", elbow, _ELBOW, 0.95),
        ("settled", settled, _SETTLED, 0.85),
    ):
        if check is not None:
            _mark(axes, label, check, records, colour, height * axes.get_ylim()[1])


def _mark(
    axes: Axes,
    label: str,
    check: int,
    records: Sequence[CheckDistances],
    colour: str,
    height: float,
) -> None:
    record = records[check - 1]
    late = check > len(records) / 2
    axes.vlines(check, 0, height, color=colour, linewidth=1, alpha=0.5)
    if record.distance_mean is not None:
        axes.plot(check, record.distance_mean, "o", color=colour, markersize=8)
    axes.annotate(
        f"{label}: step {record.step:,}",
        (check, height),
        xytext=(-5 if late else 5, 0),
        textcoords="offset points",
        ha="right" if late else "left",
        va="center",
        color=colour,
        fontsize=FONT_SIZE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
