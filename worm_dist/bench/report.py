"""Prints a benchmark's table, and writes the file and plot of all benchmarks in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.table import Table

from ..checkpoint.durable_io import write_json
from ..errors import CheckpointError
from ..terminal import console_of
from .plot import picture
from .results import Panel, Spread

__all__ = ["read_panels", "show", "write_panels"]

_FILE = "bench.json"
_KINDS = ("wire", "step", "packing", "overhead", "hiccup", "zero", "fsdp", "checkpoint", "compute")


def read_panels(folder: Path) -> list[Panel]:
    """Read the results of earlier benchmarks; empty if there are none.

    Raises:
        CheckpointError: the file has another format.
    """
    path = folder / _FILE
    if not path.exists():
        return []
    try:
        return [Panel.from_json(panel) for panel in json.loads(path.read_text())["panels"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"bench: {path} was not written by a benchmark of this version ({error!r}); remove it "
            "or choose another --out"
        ) from error


def write_panels(folder: Path, earlier: Sequence[Panel], newest: Panel) -> None:
    """Write ``bench.json`` and ``bench.png`` with the newest panel of each key."""
    panels = {panel.key: panel for panel in (*earlier, newest)}
    ordered = sorted(panels.values(), key=_position)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _FILE, {"panels": [panel.as_json() for panel in ordered]})
    picture(ordered).savefig(folder / "bench.png", dpi=150)


def _position(panel: Panel) -> tuple[int, float]:
    """Sort key: kind of benchmark, then network, from the slowest to the fastest."""
    kind, _, network = panel.key.partition(" ")
    number, unit = network.rstrip("kmgbit"), network.lstrip("0123456789")
    scale = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    rate = int(number) * scale[unit] if number.isdecimal() and unit in scale else float("inf")
    return _KINDS.index(kind), rate


def show(panel: Panel, file: TextIO | None = None) -> None:
    """Print the table of a panel."""
    console = console_of(file)
    console.print()
    console.print(_table(panel))
    for line in (*panel.lines, *(f"{name}: {value}" for name, value in panel.setting.items())):
        console.print(line)


def _table(panel: Panel) -> Table:
    table = Table(title=panel.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    has_processor = any(row.processor is not None for row in panel.rows)
    for heading in (
        panel.unit,
        "quartiles",
        f"to {panel.rows[0].name}",
        "quartiles",
        *["processor"] * has_processor,
        "handed over",
        "ideal",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in panel.rows:
        processor = () if row.processor is None else (f"{row.processor.median:.3f}",)
        shares = ("-" if s is None else f"{s:.3f}" for s in (row.sent_share, row.ideal))
        table.add_row(row.name, *_cells(row.value), *_cells(row.ratio), *processor, *shares)
    return table


def _cells(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.3f}", f"{spread.low:.3f}-{spread.high:.3f}"
