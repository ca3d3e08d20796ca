"""Outcome of a run in three lines: accuracy, size and traffic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["compared", "count", "outcome", "percent"]


def outcome(result: Mapping[str, Any], dense: Mapping[str, Any] | None = None) -> list[str]:
    """Describe what came out of a run; figures that it does not have are left out.

    Args:
        result: the content of ``result.json``.
        dense: that of a run of the same length without a search, to compare with.
    """
    accuracy, traffic = result["accuracy"], result["traffic"]
    tested = f"{_share(accuracy['final'])} of the test split at the end"
    sent = _of(traffic["dense_bytes_per_step"], traffic["ticket_bytes_per_step"], "bytes a step")
    if dense is not None:
        tested += f" (dense network, trained as long: {_share(dense['accuracy']['final'])})"
        total, dense_total = (run["traffic"]["total_bytes"] for run in (result, dense))
        sent += f"; in the whole run {percent(total, dense_total, 1)} of the dense run's"
    if accuracy["after_draw"] is not None:
        before, after = _share(accuracy["before_draw"]), _share(accuracy["after_draw"])
        tested += f"; {before} right before the draw, {after} right after it"
    sizes = [
        _of(result["parameters"]["dense"], result["parameters"]["ticket"], "parameters"),
        _of(result["flops"]["dense"], result["flops"]["ticket"], "FLOPs a sample"),
    ]
    return [f"accuracy: {tested}", f"network: {', '.join(sizes)}", f"traffic: {sent}"]


def _share(value: float | None) -> str:
    return percent(value, 1, digits=2) or "-"


def _of(dense: int | None, ticket: int | None, what: str) -> str:
    if ticket is None:
        return f"{count(dense)} {what}"
    return f"{count(ticket)} of {count(dense)} {what} ({percent(ticket, dense, digits=1) or '-'})"


def count(value: int | None) -> str:
    """A number with separators of thousands; "-" if it is missing."""
    return "-" if value is None else f"{value:,}"


def percent(part: float | None, whole: float | None, digits: int = 2) -> str:
    """``part`` in percent of ``whole``; empty if either is missing."""
    return "" if part is None or not whole else f"{100 * part / whole:.{digits}f} %"


def compared(value: int | None, dense: int | None) -> str:
    """A number, and what share of the dense network's it is."""
    share = percent(value, dense, digits=1)
    return f"{count(value)} ({share})" if share else count(value)
