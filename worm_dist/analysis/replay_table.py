"""Prints a replay as a table: the checks, and the verdicts of both rules side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.table import Table

from ..config import SearchConfig
from ..search.decision import Decision, mean
from ..terminal import console_of
from .replay import Replay

__all__ = ["remarks", "show"]

_GAP = 2
"""Number of spaces between columns."""


def show(replay: Replay, journal: str, remarks: Sequence[str], file: TextIO | None = None) -> None:
    """Print the table, and what both rules come to.

    Args:
        replay: what to print.
        journal: where it is from.
        remarks: lines to print below.
        file: the stream to write to; the default is the standard output.
    """
    console = console_of(file)
    console.print(journal, style="bold")
    console.print(f"Replayed: {_described(replay.config)}.")
    console.print()
    console.print(_table(replay))
    console.print()
    for what in ("elbow", "settled"):
        for name, decisions in (("in the run", replay.own), ("replayed", replay.decisions)):
            number = replay.first(decisions, what)
            console.print(f"{what:8}{name:12}{_when(replay, number)}")
    for remark in remarks:
        console.print(f"Note: {remark}.")


def _described(config: SearchConfig) -> str:
    elbow = config.elbow
    of_rule = {"margin": f" {elbow.margin:g}", "relative": f" {elbow.fraction:g}"}
    least = config.masks_before_elbow
    return (
        f"rule {elbow.rule}{of_rule.get(elbow.rule, '')} from {least} masks on, settled up to "
        f"{config.settled:g} in a window of {config.window}"
    )


def _table(replay: Replay) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for heading in ("check", "epoch", "step", "mean\ndistance", "largest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for of in ("of the run", "replayed"):
        table.add_column(f"threshold\n{of}", justify="right", no_wrap=True)
        table.add_column(f"verdict\n{of}", no_wrap=True)
    first = replay.first(replay.decisions, "elbow")
    rows = zip(replay.checks, replay.curve, replay.own, replay.decisions)
    for number, (line, distances, own, decision) in enumerate(rows):
        table.add_row(
            str(number + 1),
            f"{line.epoch:g}",
            f"{line.step:,}",
            _distance(mean(distances)),
            _distance(max(distances, default=None)),
            _distance(own.threshold),
            _verdict(own, own.elbow),
            _distance(decision.threshold),
            _verdict(decision, number == first),
        )
    return table


def _distance(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _verdict(decision: Decision, is_elbow: bool) -> str:
    found = [("elbow", is_elbow), ("settled", decision.settled)]
    return ", ".join(word for word, holds in found if holds) or "-"


def _when(replay: Replay, number: int | None) -> str:
    if number is None:
        return f"not in {len(replay.checks)} checks"
    line = replay.checks[number]
    return f"check {number + 1}, epoch {line.epoch:g}, step {line.step:,}"


def remarks(replay: Replay, settings: Mapping[str, Any] | None) -> list[str]:
    """What to keep in mind of a replay, one sentence each.

    Args:
        replay: the replay.
        settings: the run's settings by dotted key; None if they are not known.
    """
    found = []
    elbow = replay.first(replay.own, "elbow")
    if settings is None:
        found.append("the run has no run.json, so what is not given has its default value")
    elif settings.get("truncation.mode") == "off":
        found.append("the run does not truncate, so its own elbow is not in the journal")
    if len(replay.checks) < replay.num_checks:
        found.append(
            f"the newest checkpoint has the masks of {len(replay.checks)} of "
            f"{replay.num_checks} checks"
        )
    if elbow is not None and elbow + 1 < len(replay.checks):
        found.append(
            f"the checks after the run's own elbow, check {elbow + 1}, are of a network that is "
            "truncated there"
        )
    elif elbow is not None and replay.first(replay.decisions, "elbow") is None:
        found.append(
            "the run has no check after its own elbow, so whether the replayed rule finds a later "
            "one is not known"
        )
    return found
