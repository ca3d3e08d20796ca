"""Plot of the benchmarks: the variants as bars, with the ideal share of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .results import Panel, Row

__all__ = ["picture"]

# From the colour-blind safe palette of Okabe and Ito.
_OURS, _OURS_COMPRESSED, _IDEAL = "#0072B2", "#56B4E9", "#D55E00"
_OTHERS, _GREY = "#B8B8B8", "#666666"
_BAR = 0.62
_LINE = 0.24
"""Distance between bars in inches."""


def picture(panels: Sequence[Panel]) -> Figure:
    """Plot one bar chart per panel: ratios to the first variant, with whiskers at the quartiles."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    most = max(len(panel.rows) + len(panel.figures) for panel in panels)
    size = (6.4 * columns, 0.6 + lines * (0.9 + _LINE * most))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels):
        _bars(axes, panel)
        axes.set_ylim(most - 0.4, -0.6)  # equally thick bars in all panels, the first on top
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _legend(figure)
    return figure


def _bars(axes: Axes, panel: Panel) -> None:
    names = [row.name for row in panel.rows]
    medians = [row.ratio.median for row in panel.rows]
    below = [row.ratio.median - row.ratio.low for row in panel.rows]
    above = [row.ratio.high - row.ratio.median for row in panel.rows]
    axes.barh(
        names,
        medians,
        height=_BAR,
        color=[_colour(name) for name in names],
        xerr=(below, above),
        error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": "black"},
    )
    for height, row in enumerate(panel.rows):
        _beside(axes, height, row, panel.unit)
    for below_bars, line in enumerate(panel.lines, len(names)):
        axes.text(0, below_bars + 0.2, line, va="center", fontsize=9, color=_GREY)
    axes.plot((1, 1), (-0.6, len(names) - 0.4), color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.03 * max(1.0, *(row.ratio.high for row in panel.rows)))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(f"ratio to {names[0]}", color=_GREY)


def _colour(name: str) -> str:
    if not name.startswith(("worm", "engine")):
        return _OTHERS
    return _OURS_COMPRESSED if name.endswith(("bf16", "PowerSGD")) else _OURS


def _beside(axes: Axes, height: int, row: Row, unit: str) -> None:
    """Draw the ideal as a line across the bar, and the figures in a column on the right."""
    if row.ideal is not None:
        ends = (height - 0.45, height + 0.45)
        axes.plot((row.ideal,) * 2, ends, color=_IDEAL, linewidth=2, zorder=3)
    axes.text(
        1.02,
        height,
        f"{row.ratio.median:.3f}   {row.value.median:.3g} {unit}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=9,
        color=_GREY,
    )


def _legend(figure: Figure) -> None:
    figure.legend(
        handles=[
            Patch(color=_OURS, label="worm_dist"),
            Patch(color=_OURS_COMPRESSED, label="worm_dist, compressed"),
            Patch(color=_OTHERS, label="others"),
            Line2D([], [], color="black", linewidth=1, label="quartiles over the rounds"),
            Line2D([], [], color=_IDEAL, linewidth=2, label="ideal: bytes of live elements"),
        ],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
