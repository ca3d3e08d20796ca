"""Pictures of the ledger: accuracy against cost, and the course of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .control import CONTROLS
from .row import Row
from .table import parts_of, title_of

__all__ = ["course", "trade_off"]

# The colour-blind safe palette of Okabe and Ito; grey is for the dense network.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_GREY = "#666666"
_MARKERS = dict(zip(CONTROLS, "sDv^"))
_SIZE = (6.4, 4.4)


def trade_off(rows: Sequence[Row]) -> Figure:
    """Plot accuracy against the FLOPs of the whole run: the mean over seeds of every rule and
    control, with standard deviations.  One panel for every subject, ratio and number of epochs."""
    parts = parts_of(rows)
    figure, grid = _figure(len(parts), 1)
    for (axes,), (cell, part) in zip(grid, parts.items()):
        for rule, here in _by_rule(part).items():
            number = _number(rule, part)
            accuracies, costs = [row.final for row in here], [row.run_flops for row in here]
            axes.errorbar(
                statistics.mean(costs),
                statistics.mean(accuracies),
                xerr=_deviation(costs),
                yerr=_deviation(accuracies),
                marker=_MARKERS.get(rule.partition(": ")[2], "o"),
                color=_colour(number),
                fillstyle="full" if number < len(_COLOURS) else "none",
                markersize=7,
                elinewidth=1,
                capsize=2.5,
                linestyle="none",
                label=rule,
            )
        axes.set_xlabel("FLOPs of the run, as a fraction of the dense run's")
        axes.set_ylabel("validation accuracy at the end")
        axes.set_xlim(left=0)
        _finish(axes, cell)
    return figure


def course(rows: Sequence[Row]) -> Figure:
    """Plot accuracy, payload and FLOPs over the epochs, as means over seeds, of the dense network
    and the rules; controls that prune are dashed.

    The accuracies have re-estimated BatchNorm statistics.  One line of panels for every subject,
    ratio and number of epochs.
    """
    parts = parts_of(rows)
    figure, grid = _figure(len(parts), 3)
    for line, (cell, part) in zip(grid, parts.items()):
        _curves(line[0], part, lambda row: row.estimated_accuracies, "validation accuracy")
        _curves(line[1], part, lambda row: _steps(row.sent), "bytes of the epoch, dense = 1")
        _curves(line[2], part, lambda row: row.computed, "FLOPs so far, in dense epochs")
        for axes in line:
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(line[0], cell, legend=line[-1])
    return figure


def _curves(
    axes: Axes, part: Sequence[Row], curve: Callable[[Row], Sequence[float]], label: str
) -> None:
    for rule, here in _by_rule(part).items():
        if ": " in rule and all(row.ticket_epoch is None for row in here):
            continue  # the straight lines of thinner networks
        means = [statistics.mean(values) for values in zip(*map(curve, here), strict=True)]
        number = _number(rule, part)
        style = "--" if ": " in rule else "-" if number < len(_COLOURS) else "-."
        epochs = range(1, len(means) + 1)
        axes.plot(epochs, means, style, color=_colour(number), linewidth=1.4, label=rule)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _steps(cumulative: Sequence[float]) -> list[float]:
    return [now - before for before, now in zip([0.0, *cumulative], cumulative)]


def _by_rule(part: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows without an error, by rule; those of a rule that always failed are left out."""
    complete = [row for row in part if not row.error]
    return {
        rule: [row for row in complete if row.key.rule == rule]
        for rule in dict.fromkeys(row.key.rule for row in complete)
    }


def _number(rule: str, part: Sequence[Row]) -> int:
    """The number of a rule in a panel, that of its controls too; -1 for the dense network."""
    parents = dict.fromkeys(row.key.rule.partition(": ")[0] for row in part)
    parents.pop("dense", None)
    return -1 if rule == "dense" else list(parents).index(rule.partition(": ")[0])


def _colour(number: int) -> str:
    return _GREY if number < 0 else _COLOURS[number % len(_COLOURS)]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _figure(lines: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    width, height = _SIZE
    figure = Figure(figsize=(2.6 + width * columns, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [list(line) for line in figure.subplots(lines, columns, squeeze=False)]


def _finish(axes: Axes, cell: tuple[str, float, int], legend: Axes | None = None) -> None:
    axes.set_title(title_of(*cell), loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    (legend or axes).legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9
    )
