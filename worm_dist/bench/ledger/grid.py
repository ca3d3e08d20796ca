"""Grid of extreme removal settings, to verify that no network is destroyed without an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ...presets import merge
from .row import Row
from .rule import Rule, triggered_at
from .spec import RunSpec

__all__ = ["PACES", "RATIOS", "TRIGGERS", "grid_specs", "outcome", "summary"]

PACES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "at once": {"duration": "1ba", "fade_steps": 1},
    "one long fade": {"duration": "8ba", "fade_steps": 8},
    "four epochs": {"duration": "4ep"},
}
TRIGGERS = (1, 3, 6)
RATIOS = (0.3, 0.5, 0.7, 0.9)
_EPOCHS = 12
_CHANCE = 0.15
"""Accuracy that counts as chance: 0.1, plus a margin for random variation."""


def grid_specs(
    subjects: Sequence[str], triggers: Sequence[float], ratios: Sequence[float]
) -> list[RunSpec]:
    """All combinations of subject, epoch of the elbow, pace and ratio."""
    return [
        RunSpec(subject, _rule(trigger, pace), ratio, seed=1, epochs=_EPOCHS)
        for subject, trigger, pace, ratio in product(subjects, triggers, PACES, ratios)
    ]


def _rule(trigger: float, pace: str) -> Rule:
    # A low minimum allows the largest ratio.
    changes = merge(triggered_at(trigger), {"truncation": {"removal": dict(PACES[pace])}})
    return Rule(
        f"{pace}, from epoch {trigger}",
        changes=merge(changes, {"search": {"min_keep_ratio": 0.05}}),
    )


def outcome(row: Row) -> str:
    """Outcome of a run, in a few words."""
    if row.error:
        return row.error.partition(":")[0]
    if row.final <= _CHANCE:
        return "at chance, in silence"
    if row.removed_fraction < 1 and row.ticket_epoch is None:
        return "still leaving"
    return "paused, trains on" if row.paused_steps else "trains on"


def summary(rows: Sequence[Row]) -> str:
    """Markdown table: for every subject and pace the outcomes with their counts, and the lowest and
    mean final accuracy of the runs without an error."""
    lines = [
        "| subject | pace | cells | outcome | lowest, mean accuracy |",
        "|---|---|---|---|---|",
    ]
    for subject in dict.fromkeys(row.key.subject for row in rows):
        for pace in PACES:
            here = [
                row
                for row in rows
                if row.key.subject == subject and row.key.rule.startswith(f"{pace},")
            ]
            if not here:
                continue
            counts = Counter(map(outcome, here))
            outcomes = ", ".join(f"{count} {what}" for what, count in counts.most_common())
            ended = [row.final for row in here if not row.error]
            figures = f"{min(ended):.3f}, {sum(ended) / len(ended):.3f}" if ended else "–"
            lines.append(f"| {subject} | {pace} | {len(here)} | {outcomes} | {figures} |")
    return "\n".join(lines)
