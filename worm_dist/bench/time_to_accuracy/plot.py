"""Plot of the benchmark: accuracy over the seconds of the slowest link."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..ledger.row import Row
from ..network import rate_text
from .methods import LABELS
from .table import MARGINS, Results

__all__ = ["picture"]

# The colour-blind safe palette of Okabe and Ito.  One colour for what prunes and one for what does
# not; what compresses alike has one style of line.
_STYLES = {
    "dense": ("#666666", "-"),
    "dense, bf16 hook": ("#666666", "--"),
    "dense, PowerSGD hook": ("#666666", ":"),
    "worm: uniform at equal FLOPs": ("#D55E00", "-"),
    "early-bird": ("#009E73", "-"),
    "worm": ("#0072B2", "-"),
    "worm, bf16": ("#0072B2", "--"),
    "worm, PowerSGD": ("#0072B2", ":"),
}
_WIDTH, _HEIGHT = 7.4, 4.6


def picture(results: Results) -> Figure:
    """Plot the validation accuracy over seconds, as means over seeds: a line of panels for every
    subject and number of epochs, a panel for every network.

    The accuracies have re-estimated BatchNorm statistics.
    """
    cells = list(dict.fromkeys((row.key.subject, row.key.epochs) for row in results.rows))
    networks = results.networks
    size = (2.8 + _WIDTH * len(networks), 0.3 + _HEIGHT * len(cells))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(cells), len(networks), squeeze=False)
    for line, (subject, epochs) in zip(grid, cells):
        rows = [r for r in results.rows if (r.key.subject, r.key.epochs) == (subject, epochs)]
        for axes, network in zip(line, networks):
            _panel(axes, results, rows, network)
            axes.set_title(f"{subject}, {rate_text(network)}", loc="left", fontsize=11)
    grid[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def _panel(axes: Axes, results: Results, rows: Sequence[Row], network: str) -> None:
    ratios = sorted({row.key.prune_ratio for row in rows}, reverse=True)
    for ratio in ratios:
        for rule, label in LABELS.items():
            here = [r for r in rows if (r.key.rule, r.key.prune_ratio) == (rule, ratio)]
            curves = [seconds for row in here if (seconds := results.seconds_of(row, network))]
            if not curves:
                continue
            colour, style = _STYLES[rule]
            axes.plot(
                [statistics.mean(each) for each in zip(*curves)],
                [statistics.mean(each) for each in zip(*(r.estimated_accuracies for r in here))],
                style,
                color=colour,
                linewidth=1.5,
                alpha=1.0 if ratio in (0.0, ratios[0]) else 0.5,
                label=label + (f", p = {ratio:g}" if ratio else ""),
            )
    _targets(axes, results, rows)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation accuracy")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def _targets(axes: Axes, results: Results, rows: Sequence[Row]) -> None:
    """A line at the first target, and limits of the axis that show where the methods differ."""
    finals = [other.final for row in rows if (other := results.baseline(row)) is not None]
    if not finals:
        return
    final = statistics.mean(finals)
    axes.axhline(final - MARGINS[0] / 100, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set_ylim(final - 0.06, final + 0.01)
