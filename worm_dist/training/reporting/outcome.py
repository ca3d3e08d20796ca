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
    has_ticket = result["parameters"]["ticket"] is not None
    tested = [f"{percent(accuracy['final'], 1) or '-'} of the test split at the end"]
    if has_ticket:
        tested.append(
            f"{percent(accuracy['before_draw'], 1) or '-'} right before the draw, "
            f"{percent(accuracy['after_draw'], 1) or '-'} right after it"
        )
    if dense is not None:
        tested.append(f"{percent(dense['accuracy']['final'], 1)} for the dense network, as long")
    sizes = [
        f"{_of(result['parameters'], has_ticket)} parameters",
        f"{_of(result['flops'], has_ticket)} FLOPs a sample",
    ]
    dense_bytes, ticket_bytes = traffic["dense_bytes_per_step"], traffic["ticket_bytes_per_step"]
    sent = _of({"dense": dense_bytes, "ticket": ticket_bytes}, ticket_bytes is not None)
    whole = ""
    if dense is not None:
        total, dense_total = (run["traffic"]["total_bytes"] for run in (result, dense))
        whole = f"; {percent(total, dense_total, 1)} of the dense run's bytes in all"
    return [
        f"accuracy: {'; '.join(tested)}",
        f"network: {', '.join(sizes)}",
        f"traffic: {sent} bytes a step{whole}",
    ]


def _of(figures: Mapping[str, int | None], has_ticket: bool) -> str:
    dense, ticket = figures["dense"], figures["ticket"]
    if not has_ticket:
        return count(dense)
    return f"{count(ticket)} of {count(dense)} ({percent(ticket, dense, digits=1) or '-'})"


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
