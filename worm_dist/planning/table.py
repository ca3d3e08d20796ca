"""Prints a forecast as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from rich.table import Table

from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.selection import importance_of
from ..models import BUILDERS, TORCHVISION
from ..search.rounding import ratio_reached
from ..terminal import console_of
from .console import GAP, plain_table, print_table
from .costs import Cost
from .forecast import Forecast, members_of
from .formatting import column, column_widths, compared, listed, short
from .memory_table import engine_memory, training_memory
from .stage import Stage
from .time_table import method, setting, times

__all__ = ["show"]

_MEANING: Mapping[Stage, str] = {
    "truncated": "the gradients of dropped channels are not sent",
    "faded": "nor are those of the columns that read them",
    "ticket": "dropped channels are gone",
}


def show(forecast: Forecast, file: TextIO | None = None) -> None:
    """Print the tables; without colours if the output is not a terminal.

    Args:
        forecast: the forecast to print.
        file: the stream to write to; the default is the standard output.
    """
    console, target = console_of(file), forecast.target
    console.print(*_head(forecast), sep="\n")
    print_table(console, _ranked_by(forecast), _members(forecast, console.width))
    if max(forecast.groups.widths.values()) > 1:
        console.print("N x k: N channels, each of which takes k places.")
    print_table(
        console, "Costs, of what makes the channels of each group", _costs(forecast, console.width)
    )
    if forecast.groups.dense:
        print_table(console, "What stays dense", _dense(forecast, console.width))
    print_table(console, "The whole network", _totals(forecast))
    if not _is_ddp(forecast):
        title = f"Bytes a step, as each of {_ranks(forecast)} hands them to collectives"
        print_table(console, title, _traffic(forecast))
    for stage in forecast.costs:
        if stage in _MEANING:
            console.print(_meaning(stage, target.wrapper.gathers_for_passes))
    print_table(console, "Memory of training on a rank, in MiB", training_memory(forecast))
    print_table(console, "The engine's memory on a rank, in MiB", engine_memory(forecast))
    console.print(
        "Held: copies of frozen weights and of their optimizer state. Inputs: those from which "
        "BatchNorm's statistics are estimated, whole batches unless --world divides them. On a "
        "GPU; besides weights, gradients and the optimizer's own state. Shares are of the dense "
        "network's full weights."
    )
    if any(group.gates for group in forecast.groups):
        console.print("The ticket has no gates: they are folded into the weights.")
    if forecast.estimate is not None:
        print_table(console, setting(forecast.estimate), times(forecast.estimate, target.wrapper))
        console.print(method(forecast.estimate, target.wrapper))
    for remark in forecast.remarks:
        console.print(f"Note: {remark}.")


def _head(forecast: Forecast) -> list[str]:
    target, mask = forecast.target, forecast.mask
    name, shape = target.model, "x".join(str(size) for size in target.sample_shape)
    if name in BUILDERS and name.startswith(("resnet1", "vgg11")):
        name += f", in the form for small images; torchvision's is {TORCHVISION}{name}"
    share = f"{mask.num_channels - mask.num_kept:,} of {mask.num_channels:,} channels"
    if forecast.ticket is not None:
        why = f"Drops {share}, those that the ticket in {forecast.ticket} has dropped."
    else:
        why = f"Drops {share}: {_shares(forecast)}"
    lines = [name, f"Input {shape}, {target.num_classes} classes.", why]
    if not _is_ddp(forecast):
        lines.append(f"Trains under {target.wrapper.title}, on {_ranks(forecast)}.")
    return lines


def _meaning(stage: Stage, gathers_for_passes: bool) -> str:
    text = f"{stage}: {_MEANING[stage]}."
    if stage == "faded" and gathers_for_passes:
        text += " Weights of dropped channels are not gathered for a pass either."
    return text


def _ranks(forecast: Forecast) -> str:
    return f"{forecast.world_size} rank" + "s" * (forecast.world_size > 1)


def _is_ddp(forecast: Forecast) -> bool:
    return forecast.target.wrapper.kind == "ddp"


def _shares(forecast: Forecast) -> str:
    """Describe the requested share, the share reached and its distribution over the groups."""
    search, round_to = forecast.target.worm.search, forecast.target.worm.ticket.round_to
    how = f"after rounding to {round_to}" if round_to > 1 else "reached"
    if search.budget.chosen is not None and forecast.budget_reached is not None:
        quantity, share = search.budget.chosen
        of_what = "FLOPs" if quantity == "flops" else quantity
        reached = f"{100 * forecast.budget_reached:.4g} % {how}"
        text = f"the ticket may take {100 * share:g} % of the {of_what}; {reached}."
    else:
        asked = f"{100 * search.prune_ratio:g} % asked"
        if search.ratios:
            asked += ", others by search.ratios"
        text = f"{asked}, {100 * ratio_reached(forecast.mask):.3g} % {how}."
    if forecast.weights is not None:
        text += f" The scores are those of {forecast.weights}."
    elif search.threshold == "global":
        other = "other " if search.ratios else ""
        # With layer grouping, norms that share channels may each drop different ones.
        what = "norm" if search.grouping == "layer" else "group"
        text += (
            f" Before training scores say nothing, so every {other}{what} loses about the same "
            "share; in a run they decide."
        )
    return text


def _ranked_by(forecast: Forecast) -> str:
    search, groups = forecast.target.worm.search, forecast.groups
    what = " and ".join(
        ["scales"] * any(group.norms for group in groups)
        + ["gates"] * any(group.gates for group in groups)
    )
    how = "largest " if search.coupling == "max" else "mean "
    if importance_of(search, groups) == "weight_norm":
        text = f"by the {how}norm of the weights that make a channel"
    elif search.grouping == "layer":
        text = f"layer by layer by the size of their {what}"
    elif all(len(group.norms + group.gates) == 1 for group in groups):
        text = f"by the size of their {what}"
    else:
        text = f"by the {how}size of their {what}"
    return f"Channel groups, ranked {text}"


def _members(forecast: Forecast, width: int) -> Table:
    """Table of the modules that produce, rank and consume the channels of each group."""
    numbers = {
        "channels": [_counted(forecast.groups, g) for g in forecast.groups],
        "dropped": [f"{int((~forecast.mask[g.name]).sum()):,}" for g in forecast.groups],
    }
    names = _names(forecast)
    needed = [max(map(len, (heading, *column(cells, width)))) for heading, cells in names.items()]
    taken = sum(max(map(len, (heading, *cells))) for heading, cells in numbers.items())
    room = width - taken - GAP * (len(numbers) + len(names))
    texts = {
        heading: column(cells, size)
        for (heading, cells), size in zip(names.items(), column_widths(needed, room), strict=True)
    }
    first, *others = texts
    columns = texts | numbers
    table = plain_table()
    for heading in (first, *numbers, *others):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    for row in zip(*(columns[heading] for heading in (first, *numbers, *others)), strict=True):
        table.add_row(*row)
    return table


def _names(forecast: Forecast) -> dict[str, list[list[str]]]:
    """Module names of each group, by column."""
    members = [members_of(group) for group in forecast.groups]
    names = {"producers": [each["producers"] for each in members]}
    if (
        importance_of(forecast.target.worm.search, forecast.groups) != "weight_norm"
    ):  # which is computed from the producers, already listed
        # A gate scales the weight of the layer in the next column, so it has no name of its own.
        names["scored by"] = [each["norms"] + ["gate"] * len(each["gates"]) for each in members]
    return names | {"consumers": [each["consumers"] for each in members]}


def _counted(groups: Groups, group: ChannelGroup) -> str:
    places = groups.widths[group.name]
    return f"{group.num_channels:,}" + (f" x {places}" if places > 1 else "")


def _costs(forecast: Forecast, width: int) -> Table:
    """Table of each group's costs in every stage.

    ``faded`` is left out: it sends what the ticket sends, plus the live gates.
    """
    stages = [stage for stage in forecast.costs if stage != "faded"]
    ends: list[Stage] = ["dense", "ticket"]
    columns = (
        ("parameters", "parameters", ends),
        ("FLOPs a sample", "flops", ends),
        ("bytes a step" if _is_ddp(forecast) else "bytes of gradients", "payload_bytes", stages),
    )
    table = plain_table()
    table.add_column("group", no_wrap=True)
    for heading, _, shown in columns:
        names = "".join(f"{stage:>{_cell(stage)}}" for stage in shown)
        table.add_column(f"{heading}\n{names}", justify="right", no_wrap=True)
    room = width - sum(sum(map(_cell, shown)) + GAP for *_, shown in columns) - GAP

    def add(name: str, costs: Mapping[Stage, Cost], style: str | None = None) -> None:
        cells = (
            "".join(f"{short(getattr(costs[stage], key)):>{_cell(stage)}}" for stage in shown)
            for _, key, shown in columns
        )
        table.add_row(name, *cells, style=style)

    short_names = column([[group.name] for group in forecast.groups], room)
    for name, group in zip(short_names, forecast.groups, strict=True):
        add(name, {stage: each.groups[group.name] for stage, each in forecast.costs.items()})
    prefix = "others: "
    others = prefix + listed(forecast.others, room - len(prefix))
    add(others, {stage: each.rest for stage, each in forecast.costs.items()})
    add("all", {stage: each.total for stage, each in forecast.costs.items()}, style="bold")
    return table


def _cell(stage: Stage) -> int:
    return 1 + max(len(stage), len("1.23M"))


def _dense(forecast: Forecast, width: int) -> Table:
    """Table of the norms that belong to no group, with the reasons."""
    norms: dict[str, list[str]] = {}
    for norm, reason in forecast.groups.dense.items():
        norms.setdefault(reason, []).append(norm)
    table = plain_table()
    table.show_header = False
    table.add_column("norms", no_wrap=True)
    table.add_column("why")
    for reason, names in norms.items():
        table.add_row(listed(names, width // 3), reason)
    return table


def _totals(forecast: Forecast) -> Table:
    """Table of the whole network's costs, with exact numbers."""
    table = plain_table()
    table.add_column("")
    headings = ["parameters", "FLOPs a sample"] + ["bytes a step"] * _is_ddp(forecast)
    for heading in headings:
        table.add_column(heading, justify="right")
    dense = forecast.costs["dense"].total
    for stage, costs in forecast.costs.items():
        total = costs.total
        cells = [
            compared(f"{total.parameters:,}", total.parameters / dense.parameters),
            compared(f"{total.flops:,}", total.flops / dense.flops),
            compared(f"{total.payload_bytes:,}", total.payload_bytes / dense.payload_bytes),
        ]
        table.add_row(stage, *cells[: len(headings)])
    return table


def _traffic(forecast: Forecast) -> Table:
    """Table of what a rank hands to collectives, where that is more than gradients."""
    table = plain_table()
    table.add_column("")
    for heading in ("gradients", "weights", "all"):
        table.add_column(heading, justify="right")
    dense = forecast.traffic["dense"].total_bytes
    for stage, traffic in forecast.traffic.items():
        table.add_row(
            stage,
            f"{traffic.gradient_bytes:,}",
            f"{traffic.weight_bytes:,}",
            compared(f"{traffic.total_bytes:,}", traffic.total_bytes / dense),
        )
    return table
