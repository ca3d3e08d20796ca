"""Pictures of a search: which channels each check kept, and how far the masks are apart.

Every function makes a figure of its own, without pyplot and so without any global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ..search.history import Finding

__all__ = ["distance_curve", "distance_matrix", "mask_picture"]

# Of the palette of Okabe and Ito, which the colour-blind tell apart; dark against light besides.
_KEPT, _DROPPED = "#0072B2", "#F2B84B"
_MEAN, _MAX, _SETTLED, _ELBOW = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
_GREY = "#666666"

_MOST_CHECKS = 100
_MOST_ROWS = 1000
"""Rows of pixels: a screen has no more, and a row of its own for each of 26,560 channels would
leave it to chance which of them are seen."""
_MOST_ANNOTATED = 12
_MOST_LABELS = 10
_MOST_POINTS = 40
_LABEL_HEIGHT = 16
"""Pixels from one group's name to the next."""
_LONGEST_NAME = 28
_HEADROOM = 1.3
"""Of the curve, for words above it."""

_Lines = dict[str, tuple[str, list[float | None]]]
"""Name of a line -> its colour, its height at every check."""


def mask_picture(findings: Sequence[Finding]) -> Figure:
    """Which channel was kept (row) at which check (column); the newest 100 checks.

    In each group the channels are sorted by how often they were kept.  Channels that must share a
    row of pixels are averaged.

    Args:
        findings: oldest first, all of the same groups.

    Raises:
        ValueError: there is no finding.
    """
    shown = _newest(findings)
    mask = shown[-1].mask
    figure, axes = _figure(8.0, min(10.0, max(4.5, 2.5 + 0.2 * len(mask))))
    colours = LinearSegmentedColormap.from_list("kept", [_DROPPED, _KEPT])
    axes.imshow(
        _as_rows(_sorted_in_groups(_stacked(shown).T, mask.sizes)),
        cmap=colours,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, len(shown) - 0.5, mask.num_channels, 0),
    )
    _label_groups(axes, mask.sizes)
    _label_steps(axes.xaxis, shown)
    axes.set_xlabel(f"optimizer step of the check ({_checks(shown, findings)})")
    axes.set_ylabel("channels of each group, most often kept on top")
    _title(
        axes,
        f"Masks: {mask.num_kept:,} of {mask.num_channels:,} channels kept",
        f"{_newest_distance(shown[-1])}{_crowded(mask.num_channels)}",
    )
    figure.legend(
        handles=[Patch(color=_KEPT, label="kept"), Patch(color=_DROPPED, label="dropped")],
        loc="outside lower right",
        ncols=2,
        frameon=False,
    )
    return figure


def distance_matrix(findings: Sequence[Finding]) -> Figure:
    """The distance, 0 to 1, of every mask to every other; the newest 100 checks.

    Args:
        findings: oldest first, all of the same groups.

    Raises:
        ValueError: there is no finding.
    """
    shown = _newest(findings)
    distances = _distances(_stacked(shown))
    figure, axes = _figure(7.0, 6.0)
    image = axes.imshow(distances, cmap="cividis_r", vmin=0, vmax=max(float(distances.max()), 0.01))
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label("distance: share of channels that differ")
    bar.outline.set_visible(False)
    if len(shown) <= _MOST_ANNOTATED:
        _annotate(axes, distances)
    for axis in (axes.xaxis, axes.yaxis):
        _label_steps(axis, shown)
        axis.set_label_text("optimizer step of the check")
    _title(
        axes,
        "Distance between masks",
        f"{_checks(shown, findings)}, {shown[-1].mask.num_channels:,} channels",
    )
    return figure


def distance_curve(findings: Sequence[Finding], settled: float) -> Figure:
    """Mean and largest distance of each mask to the older ones in its window.

    Args:
        findings: oldest first.
        settled: the distance, 0 to 1, below which masks count as settled.

    Raises:
        ValueError: there is no finding.
    """
    newest = _newest(findings)[-1]
    figure, axes = _figure(8.0, 4.8)
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
    axes.set_xticks([index + 1 for index in _thinned(len(findings))])
    axes.set_xlabel(f"check (the newest after {newest.step:,} optimizer steps)")
    axes.set_ylabel("distance to the older masks in the window")
    _title(
        axes,
        "How much the mask still changes",
        "from the elbow on gradients may be truncated; settled masks are the ticket"
        if newest.distances
        else "the first check has no older mask to compare with",
    )
    return figure


# ---- numbers ---------------------------------------------------------------------------------


def _newest(findings: Sequence[Finding]) -> Sequence[Finding]:
    if not findings:
        raise ValueError("there is nothing to draw before the first check")
    return findings[-_MOST_CHECKS:]


def _stacked(findings: Sequence[Finding]) -> NDArray[np.float32]:
    """``[checks, channels]``, 1 = kept."""
    return np.stack([f.mask.keep.numpy() for f in findings]).astype(np.float32)


def _distances(kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[checks, checks]``.  |a xor b| = |a| + |b| - 2 |a and b|: a product instead of a loop."""
    counts = kept.sum(axis=1)
    differing = counts[:, None] + counts[None, :] - 2 * (kept @ kept.T)
    return np.asarray(differing / kept.shape[1])


def _sorted_in_groups(kept: NDArray[np.float32], sizes: Mapping[str, int]) -> NDArray[np.float32]:
    """``[channels, checks]`` with the channels of each group by falling number of ones.

    Their order in the network means nothing, and sorted ones show at a glance which still change.
    The sorting looks at no check more than at another: it cannot make masks seem to settle.
    """
    group = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    return kept[np.lexsort((-kept.sum(axis=1), group))]


def _as_rows(kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[channels, checks]`` averaged to ``_MOST_ROWS`` rows where there are more channels."""
    if len(kept) <= _MOST_ROWS:
        return kept
    starts = np.arange(_MOST_ROWS) * len(kept) // _MOST_ROWS
    sizes = np.diff(starts, append=len(kept))
    return np.asarray(np.add.reduceat(kept, starts, axis=0) / sizes[:, None], dtype=np.float32)


def _thinned(count: int) -> list[int]:
    """The last of ``count`` positions and those at equal strides before it, few enough to label."""
    return list(range(count - 1, -1, -math.ceil(count / _MOST_LABELS)))


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


# ---- words -----------------------------------------------------------------------------------


def _newest_distance(finding: Finding) -> str:
    if finding.distance_mean is None:
        return "no distance before the second check"
    return f"newest mean distance {finding.distance_mean:.3f}"


def _checks(shown: Sequence[Finding], findings: Sequence[Finding]) -> str:
    if len(shown) < len(findings):
        return f"the newest {len(shown)} of {len(findings)} checks"
    return "1 check" if len(shown) == 1 else f"{len(shown)} checks"


def _crowded(num_channels: int) -> str:
    if num_channels <= _MOST_ROWS:
        return ""
    return f"; each row mixes the colours of about {num_channels / _MOST_ROWS:.0f} channels"


def _short(name: str) -> str:
    """The end of a long name: there module names differ."""
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"


# ---- parts of a figure -----------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Size in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


def _title(axes: Axes, headline: str, detail: str) -> None:
    axes.set_title(f"{headline}\n", loc="left", fontweight="bold", fontsize=12, linespacing=1.6)
    axes.annotate(
        detail,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        color=_GREY,
        fontsize=10,
    )


def _label_steps(axis: Axis, findings: Sequence[Finding]) -> None:
    """The newest check's and, where there are many, those of every second, third, ... before it."""
    positions = _thinned(len(findings))
    names = [f"{findings[index].step:,}" for index in positions]
    axis.set_ticks(positions, names, fontsize=8)


def _label_groups(axes: Axes, sizes: Mapping[str, int]) -> None:
    """A thin line below each group; the names of those that have the room for one."""
    ends = np.cumsum(list(sizes.values()))
    axes.hlines(ends[:-1], -0.5, axes.get_xlim()[1], color="white", linewidth=0.5)
    room = _LABEL_HEIGHT / axes.bbox.height * ends[-1]
    positions, names, free_from = [], [], 0.0
    for (name, size), end in zip(sizes.items(), ends):
        middle = end - size / 2
        if middle >= free_from:
            positions.append(middle)
            names.append(f"{_short(name)} ({size})")
            free_from = middle + room
    axes.set_yticks(positions, names, fontsize=8)


def _annotate(axes: Axes, values: NDArray[np.float32]) -> None:
    for (row, column), value in np.ndenumerate(values):
        dark = value > 0.5 * values.max()
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )


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


def _mark_verdicts(axes: Axes, findings: Sequence[Finding]) -> None:
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
    axes: Axes, word: str, check: int, findings: Sequence[Finding], colour: str, height: float
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
