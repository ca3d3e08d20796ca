"""Prints the results of several runs as one Markdown table: presets as rows, seeds pooled."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]

COLUMNS: Mapping[str, Callable[[Result, Result], float | None]] = {
    "truncated from epoch": lambda run, _: run["elbow_epoch"],
    "drawn at epoch": lambda run, _: run["ticket_epoch"],
    "accuracy before the draw": lambda run, _: run["accuracy"]["before_draw"],
    "after it": lambda run, _: run["accuracy"]["after_draw"],
    "at the end": lambda run, _: run["accuracy"]["final"],
    "parameters": lambda run, dense: (
        (run["parameters"]["ticket"] or run["parameters"]["dense"]) / dense["parameters"]["dense"]
    ),
    "FLOPs": lambda run, dense: (
        (run["flops"]["ticket"] or run["flops"]["dense"]) / dense["flops"]["dense"]
    ),
    "FLOPs of the whole run": lambda run, dense: run["flops"]["mean"] / dense["flops"]["dense"],
    "bytes of the whole run": lambda run, dense: (
        run["traffic"]["total_bytes"] / dense["traffic"]["total_bytes"]
    ),
}


PAPERS: Mapping[str, Callable[[Result, Result], float | None]] = {
    "masks": lambda run, _: run["checks"] or None,
    "epochs of search": lambda run, _: run["ticket_epoch"],
    "accuracy before the draw": lambda run, _: run["accuracy"]["before_draw"],
    "after it": lambda run, _: run["accuracy"]["after_draw"],
    "after one epoch": lambda run, _: run["accuracy"]["after_one_epoch"],
    "to recover": lambda run, _: run["recovery"]["accuracy"],
    "epochs to recover": lambda run, _: run["recovery"]["epochs"],
    "at the end": lambda run, _: run["accuracy"]["final"],
    "seconds": lambda run, _: run["seconds"]["total"],
}
"""The figures that the papers' tables have."""


def main(folder: Path, columns: Mapping[str, Callable[[Result, Result], float | None]]) -> None:
    """Print the table of the runs below a folder: the papers' with mean and standard deviation, the
    other with mean and range."""
    cell = _mean_and_deviation if columns is PAPERS else _mean_and_range
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    dense = {run["seed"]: run for run in runs if columns is PAPERS or run["preset"] == "dense"}
    print(f"| preset ({len(dense)} seeds) | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for preset in dict.fromkeys(run["preset"] for run in runs):
        same = [run for run in runs if run["preset"] == preset]
        cells = [
            cell([column(run, dense[run["seed"]]) for run in same]) for column in columns.values()
        ]
        print(f"| `{preset}` | " + " | ".join(cells) + " |")


def _mean_and_range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = "" if min(known) == max(known) else f" ({min(known):.3f}–{max(known):.3f})"
    return f"{statistics.mean(known):.3f}{spread}{_missing(values)}"


def _mean_and_deviation(values: list[float | None]) -> str:
    """The deviation is that of a sample: divided by one less than the number of runs."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{spread}{_missing(values)}"


def _missing(values: list[float | None]) -> str:
    number = values.count(None)
    return f", {number} without" if number else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), PAPERS if "--papers" in sys.argv[2:] else COLUMNS)
