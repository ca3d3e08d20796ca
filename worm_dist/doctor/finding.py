"""Findings: what the doctor has looked at, and what is to be done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level", "note", "ok", "problems"]

Level = Literal["ok", "note", "problem"]
"""``note``: a run can start, but may not do what is expected.  ``problem``: it would fail."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at, in one word.
        level: how it is.
        text: what was found; for a note or a problem also what to do.
    """

    topic: str
    level: Level
    text: str


def ok(topic: str, text: str) -> Finding:
    return Finding(topic, "ok", text)


def note(topic: str, text: str) -> Finding:
    return Finding(topic, "note", text)


def problems(topic: str, error: Exception) -> list[Finding]:
    """An error's message, a finding for each of its lines."""
    return [Finding(topic, "problem", line) for line in str(error).splitlines() if line.strip()]
