"""Helpers shared by the plots of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ....search.convergence import CheckRecord

_GREY = "#666666"
_MOST_CHECKS = 100
_MOST_LABELS = 5
_DPI = 160

_Check = TypeVar("_Check")

FONT_SIZE = 10
"""Size of labels in points."""
WIDTH = 4.6
"""Width of a figure in inches: in TensorBoard's cards of about 350 pixels, labels have ten."""

__all__ = [
    "FONT_SIZE",
    "WIDTH",
    "CheckDistances",
    "checks",
    "label_steps",
    "new_figure",
    "newest",
    "stacked",
    "thinned",
    "title",
]


class CheckDistances(Protocol):
    """What a check has, with its mask or without: a record, or a line of a journal."""

    @property
    def step(self) -> int: ...
    @property
    def distances(self) -> tuple[float, ...]: ...
    @property
    def distance_mean(self) -> float | None: ...
    @property
    def distance_max(self) -> float | None: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def elbow(self) -> bool: ...
    @property
    def settled(self) -> bool: ...


def newest(records: Sequence[_Check]) -> Sequence[_Check]:
    """The newest records, at most 100."""
    if not records:
        raise ValueError("there is nothing to draw before the first check")
    return records[-_MOST_CHECKS:]


def stacked(records: Sequence[CheckRecord]) -> NDArray[np.float32]:
    """The masks as an array ``[checks, channels]``; 1 = kept."""
    return np.stack([record.mask.keep.numpy() for record in records]).astype(np.float32)


def checks(shown: Sequence[CheckRecord], records: Sequence[CheckRecord]) -> str:
    """Describe how many checks are shown."""
    if len(shown) < len(records):
        return f"newest {len(shown)} of {len(records)} checks"
    return "1 check" if len(shown) == 1 else f"{len(shown)} checks"


def thinned(count: int) -> list[int]:
    """At most 5 of ``count`` positions to label: the last one and others at equal strides."""
    return list(range(count - 1, -1, -math.ceil(count / _MOST_LABELS)))


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure without frame.

    Args:
        width, height: size in inches.
    """
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=FONT_SIZE)
    return figure, axes


def title(axes: Axes, headline: str, detail: str) -> None:
    """Add a bold headline and a grey line of detail below it."""
    axes.set_title(f"{headline}\n", loc="left", fontweight="bold", fontsize=12, linespacing=1.5)
    axes.annotate(
        detail,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        color=_GREY,
        fontsize=FONT_SIZE,
    )


def label_steps(axis: Axis, records: Sequence[CheckRecord]) -> None:
    """Label an axis with the steps of the checks, the newest one and others at equal strides."""
    positions = thinned(len(records))
    names = [f"{records[index].step:,}" for index in positions]
    axis.set_ticks(positions, names, fontsize=FONT_SIZE)
