"""Plot of the channels that each check kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
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

# From the colour-blind safe palette of Okabe and Ito; also dark against light.
_KEPT, _DROPPED = "#0072B2", "#F2B84B"
_MOST_ROWS = 1000
"""Rows of pixels.  Screens have no more; of 26,560 rows an arbitrary part would be visible."""
_LABEL_HEIGHT = 0.28
"""Vertical distance of group names in inches."""
_LONGEST_NAME = 16

__all__ = ["mask_picture"]


def mask_picture(records: Sequence[CheckRecord]) -> Figure:
    """Plot which channels (rows) were kept at which checks (columns), for the newest 100 checks.

    Within each group the channels are sorted by how often they were kept.  Channels that share a
    row of pixels are averaged.

    Args:
        records: the records of all checks, oldest first, over the same groups.

    Raises:
        ValueError: there are no records.
    """
    shown = newest(records)
    mask = shown[-1].mask
    figure, axes = new_figure(WIDTH, min(5.6, max(3.8, 2.0 + 0.28 * len(mask))))
    colours = LinearSegmentedColormap.from_list("kept", [_DROPPED, _KEPT])
    axes.imshow(
        _as_rows(_sorted_in_groups(stacked(shown).T, mask.sizes)),
        cmap=colours,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, len(shown) - 0.5, mask.num_channels, 0),
    )
    _label_groups(axes, mask.sizes)
    label_steps(axes.xaxis, shown)
    axes.set_xlabel(f"step of the check ({checks(shown, records)})", fontsize=FONT_SIZE)
    title(
        axes,
        f"{mask.num_kept:,} of {mask.num_channels:,} channels kept",
        f"{_newest_distance(shown[-1])}{_crowded(mask.num_channels)}",
    )
    figure.legend(
        handles=[Patch(color=_KEPT, label="kept"), Patch(color=_DROPPED, label="dropped")],
        loc="outside lower right",
        ncols=2,
        frameon=False,
        fontsize=FONT_SIZE,
    )
    return figure


def _sorted_in_groups(kept: NDArray[np.float32], sizes: Mapping[str, int]) -> NDArray[np.float32]:
    """Sort the channels of each group by how often they were kept, in descending order.

    The order in the network has no meaning, and sorted channels show which ones still change.  All
    checks have the same weight, so sorting cannot make masks look more settled than they are.

    Args:
        kept: ``[channels, checks]``, 1 = kept.
        sizes: number of channels of each group, by name.
    """
    group = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    return kept[np.lexsort((-kept.sum(axis=1), group))]


def _as_rows(kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average ``[channels, checks]`` to at most ``_MOST_ROWS`` rows."""
    if len(kept) <= _MOST_ROWS:
        return kept
    starts = np.arange(_MOST_ROWS) * len(kept) // _MOST_ROWS
    sizes = np.diff(starts, append=len(kept))
    return np.asarray(np.add.reduceat(kept, starts, axis=0) / sizes[:, None], dtype=np.float32)


def _newest_distance(record: CheckRecord) -> str:
    if record.distance_mean is None:
        return "no distance before the second check"
    return f"mean distance {record.distance_mean:.3f}"


def _crowded(num_channels: int) -> str:
    if num_channels <= _MOST_ROWS:
        return ""
    return f"; {num_channels / _MOST_ROWS:.0f} channels a row"


def _short(name: str) -> str:
    """The end of a long name, where module names differ."""
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"


def _label_groups(axes: Axes, sizes: Mapping[str, int]) -> None:
    """Draw a thin line below each group, and the names of groups with enough space."""
    ends = np.cumsum(list(sizes.values()))
    axes.hlines(ends[:-1], -0.5, axes.get_xlim()[1], color="white", linewidth=0.5)
    room = _LABEL_HEIGHT * axes.figure.dpi / axes.bbox.height * ends[-1]
    positions, names, free_from = [], [], 0.0
    for (name, size), end in zip(sizes.items(), ends):
        middle = end - size / 2
        if middle >= free_from:
            positions.append(middle)
            names.append(_short(name))
            free_from = middle + room
    axes.set_yticks(positions, names, fontsize=FONT_SIZE)
