"""Sheet: what all pictures of a search share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ....search.convergence import CheckRecord

_GREY = "#666666"
_MOST_CHECKS = 100
_MOST_LABELS = 10

__all__ = ["checks", "label_steps", "new_figure", "newest", "stacked", "thinned", "title"]


def newest(findings: Sequence[CheckRecord]) -> Sequence[CheckRecord]:
    if not findings:
        raise ValueError("there is nothing to draw before the first check")
    return findings[-_MOST_CHECKS:]


def stacked(findings: Sequence[CheckRecord]) -> NDArray[np.float32]:
    """``[checks, channels]``, 1 = kept."""
    return np.stack([f.mask.keep.numpy() for f in findings]).astype(np.float32)


def checks(shown: Sequence[CheckRecord], findings: Sequence[CheckRecord]) -> str:
    if len(shown) < len(findings):
        return f"the newest {len(shown)} of {len(findings)} checks"
    return "1 check" if len(shown) == 1 else f"{len(shown)} checks"


def thinned(count: int) -> list[int]:
    """The last of ``count`` positions and those at equal strides before it, few enough to label."""
    return list(range(count - 1, -1, -math.ceil(count / _MOST_LABELS)))


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Size in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


def title(axes: Axes, headline: str, detail: str) -> None:
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


def label_steps(axis: Axis, findings: Sequence[CheckRecord]) -> None:
    """The newest check's and, where there are many, those of every second, third, ... before it."""
    positions = thinned(len(findings))
    names = [f"{findings[index].step:,}" for index in positions]
    axis.set_ticks(positions, names, fontsize=8)
