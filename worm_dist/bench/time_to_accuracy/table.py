"""Tables of the benchmark: what a target accuracy costs, in FLOPs, bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ledger.row import Key, Row
from ..ledger.subject import SUBJECTS
from ..ledger.table import header, spread, title_of
from ..network import rate_text
from .methods import BASELINE, LABELS, counterpart
from .step_times import StepTimes

__all__ = ["MARGINS", "Results", "tables"]

MARGINS = (0.5, 1.0, 2.0)
"""Targets: the final validation accuracy of plain DDP with the same seed, less so many points."""

_LEGEND = """\
Cells are the mean ± standard deviation over seeds; the number of seeds is in brackets where it is
not that of all.  Ratios are to plain DDP with the same seed, and to the counterpart: plain DDP with
the same compression.  A target is plain DDP's final validation accuracy with the same seed, less
0.5, 1 or 2 points; it is reached at the end of the first epoch that has it.  `–`: with no seed.
"""


@dataclass(frozen=True)
class Results:
    """What has been trained and measured.

    Attributes:
        rows: the rows of all runs, without those that an error ended.
        step_times: the step times of their methods, over every network.
    """

    rows: Sequence[Row]
    step_times: Sequence[StepTimes]

    @property
    def networks(self) -> list[str]:
        """The networks, in the order in which they were measured."""
        return list(dict.fromkeys(each.network for each in self.step_times))

    def times_of(self, row: Row, network: str) -> StepTimes | None:
        """The step times of a row's method."""
        key = row.key
        wanted = key.subject, key.rule, key.prune_ratio, network
        return next(
            (
                each
                for each in self.step_times
                if (each.subject, each.rule, each.prune_ratio, each.network) == wanted
            ),
            None,
        )

    def seconds_of(self, row: Row, network: str) -> list[float] | None:
        """Seconds to the end of every epoch, composed; None without step times."""
        subject = SUBJECTS[row.key.subject]
        steps = len(subject.samples().images) // subject.batch_size
        times = self.times_of(row, network)
        return None if times is None else times.seconds_of(row, steps)

    def baseline(self, row: Row) -> Row | None:
        """The row of plain DDP with the same seed."""
        return self._other(row.key, BASELINE)

    def counterpart(self, row: Row) -> Row | None:
        """The row of plain DDP with the same compression and seed."""
        rule = counterpart(row.key)
        return None if rule is None else self._other(row.key, rule)

    def _other(self, key: Key, rule: str) -> Row | None:
        wanted = replace(key, rule=rule, prune_ratio=0.0)
        return next((row for row in self.rows if row.key == wanted), None)

    def epoch_of(self, row: Row, margin: float) -> int | None:
        """The first epoch, from 1 on, whose accuracy is the target's; None if it is not reached."""
        baseline = self.baseline(row)
        if baseline is None:
            return None
        target = baseline.final - margin / 100 - 1e-9
        epochs = enumerate(row.accuracies, start=1)
        return next((epoch for epoch, accuracy in epochs if accuracy >= target), None)


_Curve = Callable[[Row], Sequence[float] | None]


def tables(results: Results) -> str:
    """Markdown: a table of what does not depend on the network, and one for every network, for
    every subject and number of epochs."""
    parts = []
    for subject, epochs in dict.fromkeys((r.key.subject, r.key.epochs) for r in results.rows):
        rows = [r for r in results.rows if (r.key.subject, r.key.epochs) == (subject, epochs)]
        parts.append(f"## {title_of(subject, 0.0, epochs)}")
        parts.append("\n".join(_costs(results, rows)))
        for network in results.networks:
            parts.append(f"### Seconds, {rate_text(network)}")
            parts.append("\n".join(_seconds(results, rows, network)))
    return "\n\n".join([*parts, _LEGEND])


def _methods(rows: Sequence[Row]) -> Mapping[tuple[str, float], list[Row]]:
    """The rows of every method and ratio, in the order of ``LABELS``."""
    ratios = sorted({row.key.prune_ratio for row in rows}, reverse=True)
    keys = [(rule, ratio) for ratio in (0.0, *ratios) for rule in LABELS]
    by_method = {
        (rule, ratio): [r for r in rows if (r.key.rule, r.key.prune_ratio) == (rule, ratio)]
        for rule, ratio in keys
    }
    return {key: here for key, here in by_method.items() if here}


def _label(method: tuple[str, float]) -> str:
    rule, ratio = method
    return LABELS[rule] + (f", p = {ratio:g}" if ratio else "")


def _costs(results: Results, rows: Sequence[Row]) -> list[str]:
    titles = ["method", "seeds", "accuracy", "to DDP (points)", "test accuracy"]
    titles += ["FLOPs of the run", "bytes of the run"]
    for margin in MARGINS:
        titles += [f"-{margin:g}: reached", "epoch", "FLOPs, to DDP", "bytes, to DDP"]
    lines = header(titles)
    for method, here in _methods(rows).items():
        cells = [
            f"{len(here)}",
            spread([row.final for row in here], 4),
            spread([_points(row, results.baseline(row)) for row in here], 2),
            spread([row.test_accuracy for row in here], 4),
            spread([row.run_flops for row in here], 3),
            spread([row.run_bytes for row in here], 3),
        ]
        for margin in MARGINS:
            epochs = [results.epoch_of(row, margin) for row in here]
            reached = sum(epoch is not None for epoch in epochs)
            cells += [
                f"{reached} of {len(here)}",
                spread(epochs, 1),
                spread([_ratio(results, row, margin, lambda r: r.computed) for row in here], 3),
                spread([_ratio(results, row, margin, lambda r: r.sent) for row in here], 3),
            ]
        lines.append(f"| {_label(method)} | {' | '.join(cells)} |")
    return lines


def _seconds(results: Results, rows: Sequence[Row], network: str) -> list[str]:
    def curve(row: Row) -> Sequence[float] | None:
        return results.seconds_of(row, network)

    titles = ["method", "step (ms), dense / truncated / ticket", "whole run (s)", "to DDP"]
    titles += ["to counterpart"]
    for margin in MARGINS:
        titles += [f"-{margin:g}: seconds", "to DDP", "to counterpart"]
    lines = header(titles)
    for method, here in _methods(rows).items():
        times = results.times_of(here[0], network)
        if times is None:
            continue
        ends = [seconds[-1] for row in here if (seconds := curve(row))]
        cells = [
            _steps(times),
            spread(ends, 0),
            spread([_whole(row, results.baseline(row), curve) for row in here], 3),
            spread([_whole(row, results.counterpart(row), curve) for row in here], 3),
        ]
        for margin in MARGINS:
            cells += [
                spread([_at(results, row, margin, curve) for row in here], 0),
                spread([_ratio(results, row, margin, curve) for row in here], 3),
                spread(
                    [_ratio(results, row, margin, curve, results.counterpart) for row in here], 3
                ),
            ]
        lines.append(f"| {_label(method)} | {' | '.join(cells)} |")
    return lines


def _steps(times: StepTimes) -> str:
    shown = []
    for phases in (("dense", "search"), ("truncate",), ("ticket",)):
        phase = next((phase for phase in phases if phase in times.steps), None)
        shown.append("–" if phase is None else f"{1000 * times.steps[phase]:.1f}")
    return " / ".join(shown)


def _points(row: Row, other: Row | None) -> float | None:
    return None if other is None or other is row else 100 * (row.final - other.final)


def _whole(row: Row, other: Row | None, curve: _Curve) -> float | None:
    """Cost of the whole run as a fraction of another's."""
    own, others = curve(row), None if other is None else curve(other)
    return None if not own or not others else own[-1] / others[-1]


def _at(results: Results, row: Row, margin: float, curve: _Curve) -> float | None:
    """Cost up to the target; None if it is not reached."""
    epoch, values = results.epoch_of(row, margin), curve(row)
    return None if epoch is None or values is None else values[epoch - 1]


def _ratio(
    results: Results,
    row: Row,
    margin: float,
    curve: _Curve,
    other_of: Callable[[Row], Row | None] | None = None,
) -> float | None:
    """Cost up to the target as a fraction of another row's, by default plain DDP's; None if one of
    them does not reach it."""
    other = (other_of or results.baseline)(row)
    own = _at(results, row, margin, curve)
    others = None if other is None else _at(results, other, margin, curve)
    return None if own is None or others is None else own / others
