"""Markdown table of the ledger: mean and standard deviation over seeds, and differences of pairs of
runs with the same seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from .control import CONTROLS, EQUAL_FLOPS, control_name
from .row import Key, Row

__all__ = ["header", "markdown", "parts_of", "spread", "title_of"]

_EPOCHS_AFTER = 5
"""Number of epochs after the draw in which the deepest accuracy is searched."""

LEGEND = """\
Cells are the mean ± standard deviation over seeds.  Differences are in points of accuracy, of pairs
of runs with the same seed; the number of pairs is in brackets.  `run FLOPs` and
`run bytes` are fractions of the dense run's; `FLOPs` and `parameters` are those of the final
network as fractions of the dense one's.  `accuracy` is that on the validation split, `test` that on
the test split, read once at the end.  The epochs to recover are those from the draw until the
accuracy before pruning is reached again, in the runs that reach it.
"""


@dataclass(frozen=True)
class _Pair:
    """A row, and those of the same seed that it is compared with, if they are there."""

    row: Row
    dense: Row | None
    uniform: Row | None


_Figure = Callable[[_Pair], float | None]


def _final(row: Row) -> float | None:
    return row.final


def _test(row: Row) -> float | None:
    return row.test_accuracy


def _to_dense(accuracy: Callable[[Row], float | None]) -> _Figure:
    return lambda pair: _points(accuracy, pair.row, pair.dense)


def _to_uniform(accuracy: Callable[[Row], float | None]) -> _Figure:
    return lambda pair: _points(accuracy, pair.row, pair.uniform)


def _points(accuracy: Callable[[Row], float | None], row: Row, other: Row | None) -> float | None:
    one, two = accuracy(row), None if other is None or other is row else accuracy(other)
    return None if one is None or two is None else 100 * (one - two)


def _dip(pair: _Pair) -> float | None:
    """Largest accuracy deficit to dense, in points, from the elbow to five epochs after the draw.

    Both accuracies use re-estimated BatchNorm statistics.
    """
    row, dense = pair.row, pair.dense
    start = row.ticket_epoch if row.elbow_epoch is None else row.elbow_epoch
    if dense is None or start is None:
        return None
    end = row.ticket_epoch if row.ticket_epoch is not None else len(row.accuracies)
    pruned, baseline = row.estimated_accuracies, dense.estimated_accuracies
    epochs = range(int(start), min(len(pruned), int(end) + _EPOCHS_AFTER))
    return max((100 * (baseline[epoch] - pruned[epoch]) for epoch in epochs), default=None)


@dataclass(frozen=True)
class _Column:
    title: str
    figure: _Figure
    digits: int
    is_difference: bool = False


_COLUMNS = (
    _Column("accuracy", lambda pair: pair.row.final, 4),
    _Column("to dense", _to_dense(_final), 2, is_difference=True),
    _Column("to uniform at equal FLOPs", _to_uniform(_final), 2, is_difference=True),
    _Column("run FLOPs", lambda pair: pair.row.run_flops, 3),
    _Column("run bytes", lambda pair: pair.row.run_bytes, 3),
    _Column("FLOPs", lambda pair: pair.row.flops, 3),
    _Column("parameters", lambda pair: pair.row.parameters, 3),
    _Column("test", lambda pair: pair.row.test_accuracy, 4),
    _Column("test to dense", _to_dense(_test), 2, is_difference=True),
    _Column("test to uniform at equal FLOPs", _to_uniform(_test), 2, is_difference=True),
    _Column("elbow (epoch)", lambda pair: pair.row.elbow_epoch, 2),
    _Column("drawn (epoch)", lambda pair: pair.row.ticket_epoch, 2),
    _Column("before pruning", lambda pair: pair.row.before_pruning, 4),
    _Column("after pruning", lambda pair: pair.row.after_draw, 4),
    _Column("one epoch later", lambda pair: pair.row.after_one_epoch, 4),
    _Column("epochs to recover", lambda pair: pair.row.recovery, 2),
    _Column("deepest under dense (points)", _dip, 1),
)


def parts_of(rows: Sequence[Row]) -> Mapping[tuple[str, float, int], list[Row]]:
    """The rows by subject, ratio and number of epochs; each part has those without a ratio too."""
    parts = {}
    for subject, epochs in dict.fromkeys((row.key.subject, row.key.epochs) for row in rows):
        here = [row for row in rows if (row.key.subject, row.key.epochs) == (subject, epochs)]
        ratios = dict.fromkeys(row.key.prune_ratio for row in here if row.key.prune_ratio)
        for ratio in ratios or (0.0,):
            part = [row for row in here if row.key.prune_ratio in (0.0, ratio)]
            parts[subject, ratio, epochs] = part
    return parts


def title_of(subject: str, ratio: float, epochs: int) -> str:
    """The title of a part."""
    share = f", p = {ratio:g}" if ratio else ""
    return f"{subject}{share}, {epochs} epochs"


def markdown(rows: Sequence[Row]) -> str:
    """Two tables for every subject, ratio and number of epochs: all runs, and what each rule gains
    over its controls; and what has failed."""
    parts = []
    for (subject, ratio, epochs), here in parts_of(rows).items():
        complete = [row for row in here if not row.error]
        failures = [
            f"- {row.key.rule}, seed {row.key.seed}: {row.error}" for row in here if row.error
        ]
        parts.append(f"## {title_of(subject, ratio, epochs)}")
        for lines in (_runs(here, complete), _gains(complete), failures):
            if lines:
                parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND])


def _runs(rows: Sequence[Row], complete: Sequence[Row]) -> list[str]:
    by_key = {row.key: row for row in complete}
    lines = header(["run", "seeds", *(column.title for column in _COLUMNS)])
    for rule in dict.fromkeys(row.key.rule for row in rows):
        pairs = [_pair(row, by_key) for row in complete if row.key.rule == rule]
        cells = [
            spread([column.figure(pair) for pair in pairs], column.digits, column.is_difference)
            for column in _COLUMNS
        ]
        lines.append(f"| {rule} | {len(pairs)} | " + " | ".join(cells) + " |")
    return lines


def _gains(complete: Sequence[Row]) -> list[str]:
    """Differences of every rule to each of its controls; empty without controls."""
    by_key = {row.key: row for row in complete}
    lines = []
    for rule, kind in product(dict.fromkeys(row.key.rule for row in complete), CONTROLS):
        name = control_name(kind, rule)
        pairs = [
            (row, other)
            for row in complete
            if row.key.rule == rule
            if (other := by_key.get(replace(row.key, rule=name)))
        ]
        if pairs:
            cells = [
                spread([_points(accuracy, *pair) for pair in pairs], 2, is_difference=True)
                for accuracy in (_final, _test)
            ]
            lines.append(f"| {rule} | {kind} | " + " | ".join(cells) + " |")
    return [*header(["rule", "difference to", "accuracy", "test"]), *lines] if lines else []


def header(titles: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def _pair(row: Row, by_key: Mapping[Key, Row]) -> _Pair:
    rule = row.key.rule.partition(": ")[0]
    uniform = replace(row.key, rule=control_name(EQUAL_FLOPS, rule))
    dense = replace(row.key, rule="dense", prune_ratio=0.0)
    return _Pair(row, by_key.get(dense), by_key.get(uniform))


def spread(values: Sequence[float | None], digits: int, is_difference: bool = False) -> str:
    """Mean and standard deviation; the number of values where it may not be that of the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{statistics.mean(known):{'+' if is_difference else ''}.{digits}f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    return f"{text} ({len(known)})" if len(known) < len(values) or is_difference else text
