"""Markdown table of the ledger, pooled over seeds and compared with dense runs of the same seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from .row import Row

__all__ = ["markdown"]

_Figure = Callable[[Row, Row | None], float | None]

_EPOCHS_AFTER = 5
"""Number of epochs after the draw in which the deepest accuracy is searched."""


def _dip(row: Row, dense: Row | None) -> float | None:
    """Largest accuracy deficit to dense, in points, from the elbow to five epochs after the draw.

    Both accuracies use re-estimated BatchNorm statistics.
    """
    if dense is None or row.elbow_epoch is None:
        return None
    end = row.ticket_epoch if row.ticket_epoch is not None else len(row.accuracies)
    pruned, baseline = row.estimated_accuracies, dense.estimated_accuracies
    epochs = range(int(row.elbow_epoch), min(len(pruned), int(end) + _EPOCHS_AFTER))
    return max((100 * (baseline[epoch] - pruned[epoch]) for epoch in epochs), default=None)


def _fall(row: Row, dense: Row | None) -> float | None:
    """Accuracy lost from the last epoch's end before the draw to right after the draw, in points.

    Ends of epochs less than half an epoch before the draw are skipped.
    """
    if row.ticket_epoch is None or row.after_draw is None or row.ticket_epoch < 1.5:
        return None
    return 100 * (row.estimated_accuracies[round(row.ticket_epoch - 1) - 1] - row.after_draw)


_COLUMNS: Mapping[str, tuple[_Figure, int]] = {
    "elbow": (lambda row, _: row.elbow_epoch, 1),
    "drawn": (lambda row, _: row.ticket_epoch, 1),
    "final": (lambda row, _: row.final if row.accuracies else None, 4),
    "to dense (points)": (
        lambda row, dense: 100 * (row.final - dense.final) if dense and row.accuracies else None,
        2,
    ),
    "after the draw": (lambda row, _: row.after_draw, 3),
    "fall within the epoch before": (_fall, 1),
    "deepest under dense": (_dip, 1),
    "run FLOPs": (lambda row, _: row.run_flops, 3),
    "run bytes": (lambda row, _: row.run_bytes, 3),
    "FLOPs": (lambda row, _: row.flops, 3),
    "parameters": (lambda row, _: row.parameters, 3),
}


def markdown(rows: Sequence[Row]) -> str:
    """One table for every subject and ratio; the cells are mean (minimum to maximum) over seeds."""
    parts = []
    for subject, ratio in dict.fromkeys((row.key.subject, row.key.prune_ratio) for row in rows):
        here = [r for r in rows if (r.key.subject, r.key.prune_ratio) == (subject, ratio)]
        dense = {
            row.key.seed: row
            for row in rows
            if row.key.subject == subject and row.key.rule == "dense"
        }
        lines = [f"{subject}, p = {ratio:g}", ""]
        lines.append("| rule | seeds | " + " | ".join(_COLUMNS) + " |")
        lines.append("|---" * (len(_COLUMNS) + 2) + "|")
        for rule in dict.fromkeys(row.key.rule for row in here):
            same = [row for row in here if row.key.rule == rule]
            cells = [
                _cell([figure(row, dense.get(row.key.seed)) for row in same], digits)
                for figure, digits in _COLUMNS.values()
            ]
            lines.append(f"| {rule} | {len(same)} | " + " | ".join(cells) + " |")
        failures = [
            f"- {row.key.rule}, seed {row.key.seed}: {row.error}" for row in here if row.error
        ]
        parts.append("\n".join([*lines, *([""] if failures else []), *failures]))
    return "\n\n".join(parts) + "\n"


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, low, high = (f"{v:.{digits}f}" for v in (statistics.mean(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"
