"""Plot of the pairwise distances of the masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ....search.convergence import CheckRecord
from .common import (
    FONT_SIZE,
    WIDTH,
    checks,
    label_steps,
    new_figure,
    newest,
    stacked,
    title,
)

_MOST_ANNOTATED = 6

__all__ = ["distance_matrix"]


def distance_matrix(records: Sequence[CheckRecord]) -> Figure:
    """Plot the distance, 0 to 1, between every pair of masks, for the newest 100 checks.

    Args:
        records: the records of all checks, oldest first, over the same groups.

    Raises:
        ValueError: there are no records.
    """
    shown = newest(records)
    distances = _distances(stacked(shown))
    figure, axes = new_figure(WIDTH, 4.2)
    image = axes.imshow(distances, cmap="cividis_r", vmin=0, vmax=max(float(distances.max()), 0.01))
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.ax.tick_params(length=0, labelsize=FONT_SIZE)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.outline.set_visible(False)
    if len(shown) <= _MOST_ANNOTATED:
        _annotate(axes, distances)
    for axis in (axes.xaxis, axes.yaxis):
        label_steps(axis, shown)
    axes.set_xlabel(f"step of the check ({checks(shown, records)})", fontsize=FONT_SIZE)
    title(
        axes,
        "Distance between masks",
        f"share of the {shown[-1].mask.num_channels:,} channels that differ",
    )
    return figure


def _distances(kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distances ``[checks, checks]``, by |a xor b| = |a| + |b| - 2 |a and b|."""
    counts = kept.sum(axis=1)
    differing = counts[:, None] + counts[None, :] - 2 * (kept @ kept.T)
    return np.asarray(differing / kept.shape[1])


def _annotate(axes: Axes, values: NDArray[np.float32]) -> None:
    for (row, column), value in np.ndenumerate(values):
        dark = value > 0.5 * values.max()
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=FONT_SIZE,
            color="white" if dark else "black",
        )
