"""Which channels each check kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ....search.convergence import CheckRecord
from .common import checks, label_steps, new_figure, newest, stacked, title

# Of the palette of Okabe and Ito, which the colour-blind tell apart; dark against light besides.
_KEPT, _DROPPED = "#0072B2", "#F2B84B"
_MOST_ROWS = 1000
"""Rows of pixels: a screen has no more, and a row of its own for each of 26,560 channels would
leave it to chance which of them are seen."""
_LABEL_HEIGHT = 16
"""Pixels from one group's name to the next."""
_LONGEST_NAME = 28

__all__ = ["mask_picture"]


def mask_picture(findings: Sequence[CheckRecord]) -> Figure:
    """Which channel was kept (row) at which check (column); the newest 100 checks.

    In each group the channels are sorted by how often they were kept.  Channels that must share a
    row of pixels are averaged.

    Args:
        findings: oldest first, all of the same groups.

    Raises:
        ValueError: there is no finding.
    """
    shown = newest(findings)
    mask = shown[-1].mask
    figure, axes = new_figure(8.0, min(10.0, max(4.5, 2.5 + 0.2 * len(mask))))
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
    axes.set_xlabel(f"optimizer step of the check ({checks(shown, findings)})")
    axes.set_ylabel("channels of each group, most often kept on top")
    title(
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


def _newest_distance(finding: CheckRecord) -> str:
    if finding.distance_mean is None:
        return "no distance before the second check"
    return f"newest mean distance {finding.distance_mean:.3f}"


def _crowded(num_channels: int) -> str:
    if num_channels <= _MOST_ROWS:
        return ""
    return f"; each row mixes the colours of about {num_channels / _MOST_ROWS:.0f} channels"


def _short(name: str) -> str:
    """The end of a long name: there module names differ."""
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"


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
