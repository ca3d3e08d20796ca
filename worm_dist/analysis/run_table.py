"""Tables of a report: the figures of the result files, and the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .run_files import RunFiles

__all__ = ["Cell", "Row", "Section", "differing_settings", "environment", "figures"]

_NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: what is shown.
        value: the exact number; None for a text.
    """

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """A row: its key in the file, its name and a cell for each run."""

    key: str
    name: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Section:
    """Rows with a common title."""

    title: str
    rows: Sequence[Row]


def _epoch(value: float) -> str:
    return f"{value:g}"


def _fraction(value: float) -> str:
    return f"{value:.4f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}"


def _whole(value: float) -> str:
    return f"{value:,}"


_Format = Callable[[Any], str]
_FIGURES: Mapping[str, Mapping[str, tuple[str, _Format]]] = {
    "Run": {
        "status": ("status", str),
        "preset": ("preset", str),
        "seed": ("seed", str),
        "world_size": ("ranks", _whole),
        "backend": ("backend", str),
        "data": ("data", str),
        "checks": ("checks", _whole),
        "elbow_epoch": ("elbow, epoch", _epoch),
        "ticket_epoch": ("ticket, epoch", _epoch),
        "live_fraction": ("live at the last check, fraction", _fraction),
        "removed_fraction": ("removed at the last check, fraction", _fraction),
    },
    "Accuracy on the test split": {
        "accuracy.final": ("at the end", _fraction),
        "accuracy.before_draw": ("before the draw", _fraction),
        "accuracy.after_draw": ("after the draw", _fraction),
        "accuracy.after_one_epoch": ("one epoch later", _fraction),
        "recovery.accuracy": ("to be reached again after the draw", _fraction),
        "recovery.epochs": ("epochs until then", _epoch),
    },
    "Parameters": {
        "parameters.dense": ("dense network", _whole),
        "parameters.ticket": ("ticket", _whole),
    },
    "FLOPs of a sample's forward pass": {
        "flops.dense": ("dense network", _whole),
        "flops.ticket": ("ticket", _whole),
        "flops.mean": ("mean over the run", _whole),
    },
    "Bytes that a rank sends": {
        "traffic.dense_bytes_per_step": ("a step, dense", _whole),
        "traffic.truncated_bytes_per_step": ("a step, truncated", _whole),
        "traffic.ticket_bytes_per_step": ("a step, ticket", _whole),
        "traffic.total_bytes": ("whole run", _whole),
    },
    "Seconds": {
        "seconds.search": ("search", _seconds),
        "seconds.truncate": ("truncation", _seconds),
        "seconds.ticket": ("ticket", _seconds),
        "seconds.total": ("whole run", _seconds),
    },
}
_SHARES = {
    "parameters.ticket": "parameters.dense",
    "flops.ticket": "flops.dense",
    "flops.mean": "flops.dense",
    "traffic.truncated_bytes_per_step": "traffic.dense_bytes_per_step",
    "traffic.ticket_bytes_per_step": "traffic.dense_bytes_per_step",
}
"""Figures that are shown with their share of another one of the same run."""


def figures(runs: Sequence[RunFiles]) -> list[Section]:
    """The figures of the result files; those that no run has are left out."""
    found = []
    for title, names in _FIGURES.items():
        rows = [
            Row(key, name, [_figure(run, key, shown) for run in runs])
            for key, (name, shown) in names.items()
        ]
        found.append(Section(title, [row for row in rows if _has_content(row)]))
    return [section for section in found if section.rows]


def _has_content(row: Row) -> bool:
    return any(cell.text != _NONE for cell in row.cells)


def _figure(run: RunFiles, key: str, shown: _Format) -> Cell:
    if key == "status":
        return Cell(run.status)
    value = _value(run.result, key)
    if value is None:
        return Cell(_NONE)
    whole = _value(run.result, _SHARES.get(key, ""))
    share = f" ({value / whole:.1%})" if whole else ""
    is_number = isinstance(value, (int, float))
    return Cell(f"{shown(value)}{share}", value if is_number else None)


def _value(result: Mapping[str, Any] | None, key: str) -> Any:
    value: Any = result
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def differing_settings(runs: Sequence[RunFiles]) -> list[Row]:
    """The settings in which runs differ; those of a run without ``run.json`` are not known."""
    known = [run.settings for run in runs if run.settings is not None]
    keys = sorted({key for settings in known for key in settings})
    differing = [
        key for key in keys if any(settings.get(key) != known[0].get(key) for settings in known[1:])
    ]
    return [Row(key, key, [Cell(_setting(run.settings, key)) for run in runs]) for key in differing]


def _setting(settings: Mapping[str, Any] | None, key: str) -> str:
    if settings is None:
        return "not known"
    if key not in settings:
        return _NONE
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value)


def environment(runs: Sequence[RunFiles]) -> list[Row]:
    """Versions of packages, and the machine of rank zero."""
    found = [dict(_environment(run)) for run in runs]
    keys = list(dict.fromkeys(key for here in found for key in here))
    return [Row(key, key, [Cell(here.get(key, _NONE)) for here in found]) for key in keys]


def _environment(run: RunFiles) -> Iterator[tuple[str, str]]:
    description = run.description or {}
    versions = description.get("versions") or (run.result or {}).get("versions") or {}
    for part in (versions, description.get("machine", {})):
        for key, value in part.items():
            yield key, str(value)
