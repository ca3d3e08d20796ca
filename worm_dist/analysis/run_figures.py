"""Figures of a report: curves of all runs in one axes, distances and masks of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..training.reporting.plots import distance_curve, mask_picture
from ..training.reporting.plots.common import new_figure
from .run_files import RunFiles
from .svg import inline_svg

__all__ = ["COLOURS", "DASHES", "Picture", "comparisons", "pictures_of"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""From the colour-blind safe palette of Okabe and Ito; without yellow, which a white page hides."""
DASHES = ("", "6 2", "2 2")
"""Of the lines of runs, one after another when the colours have all been used; as in SVG."""
_SIZE = (5.4, 3.4)
"""Inches: a phone shows it almost in full size."""
_FONT = 11
"""Size of the labels in points."""


@dataclass(frozen=True)
class Picture:
    """A figure in a page.

    Attributes:
        svg: its markup.
        caption: what it shows.
    """

    svg: Markup
    caption: str


def comparisons(runs: Sequence[RunFiles]) -> list[Picture]:
    """Accuracy, loss, bytes and FLOPs of all runs; figures for which no run has a curve are left
    out."""
    accuracy, share = "test/accuracy", PercentFormatter(1.0, decimals=0)
    bytes_sent, flops = "traffic/sent_bytes_per_step", "compute/flops_per_sample"
    found = [
        _Comparison("Accuracy on the test split", (accuracy,)),
        _Comparison(
            "Loss on the test split, and thin on training batches",
            ("test/loss", "train/loss"),
            is_log=True,
        ),
        _Comparison(
            "Bytes that a step sends, as a share of the dense network's",
            (bytes_sent,),
            relative_to="traffic/dense_bytes_per_step",
        ),
        _Comparison(
            "FLOPs of a sample's forward pass, as a share of the dense network's",
            (flops,),
            relative_to="compute/dense_flops_per_sample",
        ),
    ]
    pictures = []
    for number, comparison in enumerate(found):
        shown = [run for run in runs if comparison.values(run)]
        if shown:
            figure = comparison.figure(runs, share if comparison.relative_to else None)
            alt = f"{comparison.title}, after each epoch. {comparison.ends(shown)}"
            missing = [run.name for run in runs if run not in shown]
            lacking = f" Not recorded: {', '.join(missing)}." if missing else ""
            svg = inline_svg(figure, number, alt)
            pictures.append(Picture(svg, f"{comparison.title}.{lacking}"))
    return pictures


def pictures_of(run: RunFiles, number: int) -> list[Picture]:
    """The distances and the masks of a run, as far as it has them.

    Args:
        run: the run.
        number: number of the run in the page, from 0 on.
    """
    pictures, first = [], 100 + 2 * number
    if run.checks:
        settings = run.settings or {}
        figure = distance_curve(run.checks, settings.get("search.settled"))
        elbow = next((line for line in run.checks if line.elbow), None)
        last = run.checks[-1]
        mean = "" if last.distance_mean is None else f", the last mean {last.distance_mean:.3f}"
        start = "no elbow" if elbow is None else f"the elbow at step {elbow.step:,}"
        caption = f"Distances of the masks of {len(run.checks)} checks: {start}{mean}."
        pictures.append(Picture(inline_svg(figure, first, caption), caption))
    if run.records:
        mask = run.records[-1].mask
        caption = (
            f"Masks of {len(run.records)} checks. The last one keeps {mask.num_kept:,} of "
            f"{mask.num_channels:,} channels."
        )
        svg = inline_svg(mask_picture(run.records), first + 1, caption, has_image=True)
        pictures.append(Picture(svg, caption))
    return pictures


@dataclass(frozen=True)
class _Comparison:
    """One axes with a line for each run.

    Attributes:
        title: what is shown.
        tags: names of the curves; the first with a mark for each test, others thin.
        relative_to: name of the curve to divide by.
        is_log: whether the axis of values is logarithmic.
    """

    title: str
    tags: Sequence[str]
    relative_to: str | None = None
    is_log: bool = False

    def values(self, run: RunFiles) -> list[float]:
        return run.over_epochs(self.tags[0], self.relative_to)[1]

    def figure(self, runs: Sequence[RunFiles], formatter: PercentFormatter | None) -> Figure:
        figure, axes = new_figure(*_SIZE)
        for number, run in enumerate(runs):
            # Where lines lie on one another, the first is still seen: it is the widest.
            self._draw(axes, run, number, 2 + 1.5 * (1 - (number + 1) / len(runs)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch", fontsize=_FONT)
        axes.tick_params(which="both", length=0, labelsize=_FONT)
        axes.grid(axis="y", color="#E6E6E6")
        axes.set_axisbelow(True)
        if self.is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        if formatter is not None:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(formatter)
        return figure

    def _draw(self, axes: Axes, run: RunFiles, number: int, width: float) -> None:
        colour = COLOURS[number % len(COLOURS)]
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        style = (0, [float(length) for length in dashes.split()]) if dashes else "-"
        for tag in self.tags:
            is_first = tag == self.tags[0]
            epochs, values = run.over_epochs(tag, self.relative_to)
            axes.plot(
                epochs,
                values,
                color=colour,
                linestyle=style,
                linewidth=width if is_first else 0.8,
                marker="o" if is_first and len(values) <= 40 else "",
                markersize=2.2 * width,
            )

    def ends(self, runs: Sequence[RunFiles]) -> str:
        """The last value of each run, in words."""
        shown = (f"{run.name} {self.values(run)[-1]:.4g}" for run in runs)
        return f"At the end: {', '.join(shown)}."
