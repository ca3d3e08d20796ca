"""Prints the contents of a ticket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TextIO

import rich.console
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..mistakes import shortened
from ..planning.console import GAP, plain_table, print_table
from ..planning.formatting import column, compared
from ..terminal import console_of
from .contents import Contents
from .speed import Speed

__all__ = ["show"]

_BAR_WIDTH = 32
_NUMBERS_WIDTH = 24


def show(contents: Contents, file: TextIO | None = None) -> None:
    """Print what a ticket holds; without colours if the output is not a terminal.

    Args:
        contents: the contents to print.
        file: the stream to write to; the default is the standard output.
    """
    console = console_of(file)
    console.print(*_head(contents), sep="\n")
    print_table(console, "Kept channels", _groups(contents, console))
    if contents.parameters is not None:
        print_table(console, "The whole network", _totals(contents))
    if contents.speed is not None:
        console.print(_method(contents.speed))
    if contents.unknown is not None:
        console.print()
        console.print(f"Note: {contents.unknown}.")


def _head(contents: Contents) -> Iterator[str]:
    record, mask = contents.record, contents.mask
    yield str(contents.folder)
    if record.model is None:
        yield "A custom network, not one of worm_dist.models."
    else:
        parts = [record.model.name, f"{record.model.num_classes} classes"]
        if record.model.arguments:
            parts.append(shortened(json.dumps(record.model.arguments), 200))
        yield ", ".join(parts)
    if contents.input_shape is not None:
        yield f"Input {'x'.join(map(str, contents.input_shape))}."
    yield f"Keeps {mask.num_kept:,} of {mask.num_channels:,} channels; mask {mask.digest}."
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    yield f"Written {contents.written:%Y-%m-%d %H:%M}, by the file's date, with {versions}."
    if contents.run is not None:
        yield f"Run: {', '.join(_run(contents))}."
    if record.settings is not None:
        changed = contents.changed_settings
        settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in changed.items())
        yield f"Settings: {settings}, others by default." if changed else "Settings: the defaults."


def _run(contents: Contents) -> Iterator[str]:
    run = contents.run or {}
    accuracy = run.get("accuracy")
    final = accuracy.get("final") if isinstance(accuracy, dict) else None
    for name, value in (*run.items(), ("accuracy", final)):
        if isinstance(value, (str, int, float)):
            number = f"{value:.4g}" if isinstance(value, float) else value
            yield f"{name.replace('_', ' ')} {shortened(str(number), 100)}"


def _groups(contents: Contents, console: rich.console.Console) -> Table:
    groups = contents.record.groups
    room = console.width - _BAR_WIDTH - _NUMBERS_WIDTH - 3 * GAP
    table = plain_table()
    table.show_header = False
    for justify in ("left", "left", "right", "right"):
        table.add_column("", justify=justify, no_wrap=True)
    names = column([[group.name] for group in groups], max(room, 8))
    for name, group in zip(names, groups, strict=True):
        kept, size = len(group.kept), group.num_channels
        bar = ProgressBar(total=size, completed=kept, width=_BAR_WIDTH)
        table.add_row(name, bar, f"{kept:,}/{size:,}", f"{100 * kept / size:.1f} %")
    return table


def _totals(contents: Contents) -> Table:
    figures = {"parameters": contents.parameters, "FLOPs a sample": contents.flops}
    columns = {
        heading: (f"{counts.dense:,}", f"{counts.ticket:,}", counts.ticket / max(counts.dense, 1))
        for heading, counts in figures.items()
        if counts is not None
    }
    if contents.speed is not None:
        dense, ticket = contents.speed.dense, contents.speed.ticket
        columns["images a second"] = (f"{dense:,.0f}", f"{ticket:,.0f}", ticket / dense)
    table = plain_table()
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    table.add_row("dense", *(compared(dense, 1.0) for dense, _, _ in columns.values()))
    table.add_row("ticket", *(compared(ticket, ratio) for _, ticket, ratio in columns.values()))
    return table


def _method(speed: Speed) -> str:
    return (
        f"Images a second: forward passes in eval mode, without gradients, in float32, on batches "
        f"of {speed.num_samples} random images, measured on this machine ({speed.device}; median "
        f"of {speed.rounds}). Loading of images is left out."
    )
