"""Table: a forecast, as a person at a terminal reads it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TextIO

import rich.console
from rich.table import Table

from ..models import OWN, TORCHVISION
from .costs import Cost
from .estimate import FORMULA
from .forecast import Estimate, Forecast, Stage, members_of
from .words import fair, listed, seconds, short, shortened

__all__ = ["show"]

_WIDTH_OF_A_LOG = 100
_GAP = 2
"""Spaces between columns."""

_MEANING: Mapping[Stage, str] = {
    "truncated": "dropped channels have left the all-reduce",
    "faded": "so have the columns that read them",
    "ticket": "dropped channels are gone",
}


def show(forecast: Forecast, file: TextIO | None = None) -> None:
    """Print the tables; plain where there is no terminal.

    Args:
        forecast: what to show.
        file: where to; default the standard output.
    """
    file = file or sys.stdout
    is_log = not file.isatty() or rich.console.Console(file=file).is_dumb_terminal
    console = rich.console.Console(
        file=file,
        force_terminal=not is_log,
        color_system=None if is_log else "auto",
        width=_WIDTH_OF_A_LOG if is_log else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(*_head(forecast), sep="\n")
    parts = (
        ("Channel groups, and the scales whose mean size is their score", _members),
        ("Costs, of what makes the channels of each group", _costs),
        ("What stays dense", _dense),
        ("The whole network", _totals),
    )
    for title, part in parts:
        table = part(forecast, console.width)
        if table.row_count:
            _print(console, title, table)
    console.print(*(f"{s}: {_MEANING[s]}." for s in forecast.costs if s in _MEANING), sep="\n")
    if forecast.estimate is not None:
        _print(console, _setting(forecast.estimate), _times(forecast.estimate))
        console.print(_method(forecast.estimate))
    for remark in forecast.remarks:
        console.print(f"Note: {remark}.")


def _print(console: rich.console.Console, title: str, table: Table) -> None:
    console.print()
    console.print(title, style="bold")
    console.print(table)


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))


def _head(forecast: Forecast) -> list[str]:
    subject, mask = forecast.subject, forecast.mask
    name, shape = subject.model, "x".join(str(size) for size in subject.sample_shape)
    if name in OWN and name.startswith(("resnet1", "vgg11")):
        name += f", in the form for small images; torchvision's is {TORCHVISION}{name}"
    share = f"{mask.num_channels - mask.num_kept:,} of {mask.num_channels:,} channels"
    if forecast.ticket is not None:
        why = f"Drops {share}, those that the ticket in {forecast.ticket} has dropped."
    else:
        why = (
            f"Drops {share}: {100 * subject.worm.search.prune_ratio:g} % of every group. A run "
            "drops that share of all channels together by their scores, which say nothing before "
            "training."
        )
    return [name, f"Input {shape}, {subject.num_classes} classes.", why]


def _members(forecast: Forecast, width: int) -> Table:
    """Who makes, ranks and reads the channels of each group."""
    numbers, names = ("channels", "dropped"), ("producers", "scored by", "consumers")
    rows = [list(members_of(group).values()) for group in forecast.groups]
    needed = [
        max(len(heading), *(len(listed(row[column], width)) for row in rows))
        for column, heading in enumerate(names)
    ]
    widths = fair(needed, width - sum(len(n) + _GAP for n in numbers) - len(names) * _GAP)
    table = _table()
    table.add_column("producers", no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in names[1:]:
        table.add_column(heading, no_wrap=True)
    for group, row in zip(forecast.groups, rows, strict=True):
        first, *others = (listed(part, size) for part, size in zip(row, widths, strict=True))
        num_dropped = int((~forecast.mask[group.name]).sum())
        table.add_row(first, f"{group.num_channels:,}", f"{num_dropped:,}", *others)
    return table


def _costs(forecast: Forecast, width: int) -> Table:
    """What each group costs, stage by stage; once faded, it sends what the ticket sends."""
    stages = [stage for stage in forecast.costs if stage != "faded"]
    ends: list[Stage] = ["dense", "ticket"]
    columns = (
        ("parameters", "parameters", ends),
        ("FLOPs a sample", "flops", ends),
        ("bytes a step", "payload_bytes", stages),
    )
    table = _table()
    table.add_column("group", no_wrap=True)
    for heading, _, shown in columns:
        names = "".join(f"{stage:>{_cell(stage)}}" for stage in shown)
        table.add_column(f"{heading}\n{names}", justify="right", no_wrap=True)
    room = width - sum(sum(map(_cell, shown)) + _GAP for *_, shown in columns) - _GAP

    def add(name: str, costs: Mapping[Stage, Cost], style: str | None = None) -> None:
        cells = (
            "".join(f"{short(getattr(costs[stage], key)):>{_cell(stage)}}" for stage in shown)
            for _, key, shown in columns
        )
        table.add_row(name, *cells, style=style)

    for group in forecast.groups:
        costs = {stage: each.groups[group.name] for stage, each in forecast.costs.items()}
        add(shortened(group.name, room), costs)
    prefix = "others: "
    others = prefix + listed(forecast.others, room - len(prefix))
    add(others, {stage: each.rest for stage, each in forecast.costs.items()})
    add("all", {stage: each.total for stage, each in forecast.costs.items()}, style="bold")
    return table


def _cell(stage: Stage) -> int:
    return 1 + max(len(stage), len("1.23M"))


def _dense(forecast: Forecast, width: int) -> Table:
    """Norms that are in no group, and why."""
    norms: dict[str, list[str]] = {}
    for norm, reason in forecast.groups.dense.items():
        norms.setdefault(reason, []).append(norm)
    table = _table()
    table.show_header = False
    table.add_column("norms", no_wrap=True)
    table.add_column("why")
    for reason, names in norms.items():
        table.add_row(listed(names, width // 3), reason)
    return table


def _totals(forecast: Forecast, width: int) -> Table:
    """Of the whole network, to the last digit."""
    table = _table()
    table.add_column("")
    for heading in ("parameters", "FLOPs a sample", "bytes a step"):
        table.add_column(heading, justify="right")
    dense = forecast.costs["dense"].total
    for stage, costs in forecast.costs.items():
        total = costs.total
        table.add_row(
            stage,
            _compared(f"{total.parameters:,}", total.parameters / dense.parameters),
            _compared(f"{total.flops:,}", total.flops / dense.flops),
            _compared(f"{total.payload_bytes:,}", total.payload_bytes / dense.payload_bytes),
        )
    return table


def _setting(estimate: Estimate) -> str:
    link = estimate.link
    ranks = "rank" if link.world_size == 1 else "ranks"
    return (
        f"A step's time, estimated: {link.world_size} {ranks} at {link.text}, "
        f"{estimate.num_samples} samples each"
    )


def _times(estimate: Estimate) -> Table:
    table = _table()
    table.add_column("")
    for heading in ("computing", "all-reduce", "both at once", "one after the other"):
        table.add_column(heading, justify="right")
    dense = estimate.steps["dense"]
    for stage, step in estimate.steps.items():
        shortest, longest = step.shortest_seconds, step.longest_seconds
        table.add_row(
            stage,
            seconds(step.compute_seconds),
            seconds(step.all_reduce_seconds),
            _compared(seconds(shortest), shortest / dense.shortest_seconds),
            _compared(seconds(longest), longest / dense.longest_seconds),
        )
    return table


def _method(estimate: Estimate) -> str:
    measured = estimate.measured
    return (
        f"Computing: forward and backward pass, measured on this machine ({measured.device}; "
        f"median of {measured.rounds}). All-reduce: a ring's {FORMULA}. A real step lies between "
        "the two sums, plus latency, packing, optimizer and input, which are left out."
    )


def _compared(value: str, ratio: float) -> str:
    return f"{value} {100 * ratio:5.1f} %"
