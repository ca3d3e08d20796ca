"""Replay: what other settings of the search would have decided in a run, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import SearchConfig
from ..errors import ConfigError
from ..extras import require_extras
from ..search.convergence import CheckRecord
from ..search.decision import Decision, decide
from ..search.elbow import extras_of_rule
from ..search.window import Window
from ..training.reporting.journal_lines import CheckLine

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """The checks of a run, and what the replayed rules say of them.

    Attributes:
        config: the replayed settings of the search.
        checks: the checks that could be replayed, as the run's journal has them.
        curve: for each of them, the distances in the replayed window.
        decisions: for each of them, what the replayed rules say.
        num_checks: number of checks in the journal.
    """

    config: SearchConfig
    checks: Sequence[CheckLine]
    curve: Sequence[tuple[float, ...]]
    decisions: Sequence[Decision]
    num_checks: int

    @property
    def own(self) -> list[Decision]:
        """What the run itself decided at these checks; its elbow is where truncation started."""
        return [Decision(line.threshold, line.elbow, line.settled) for line in self.checks]

    def first(self, decisions: Sequence[Decision], what: str) -> int | None:
        """The number, from 0 on, of the first check that is an elbow, or settled; None if none is.

        Args:
            decisions: ``own`` or ``decisions``.
            what: ``elbow`` or ``settled``.
        """
        numbers = (number for number, found in enumerate(decisions) if getattr(found, what))
        return next(numbers, None)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values."""
        search = self.config
        return {
            "replayed": {
                "window": search.window,
                "settled": search.settled,
                "elbow": search.elbow.model_dump(),
            },
            "checks": [
                {
                    "step": line.step,
                    "epoch": line.epoch,
                    "distances": list(distances),
                    "run": vars(own),
                    "replayed": vars(decision),
                }
                for line, distances, own, decision in zip(
                    self.checks, self.curve, self.own, self.decisions
                )
            ],
            **{
                what: {
                    name: None if number is None else self.checks[number].step
                    for name, number in (
                        ("run", self.first(self.own, what)),
                        ("replayed", self.first(self.decisions, what)),
                    )
                }
                for what in ("elbow", "settled")
            },
            "num_checks": self.num_checks,
        }


def replay(
    config: SearchConfig,
    checks: Sequence[CheckLine],
    read_records: Callable[[], Sequence[CheckRecord]],
) -> Replay:
    """Evaluate the elbow and settled rules at every check of a run.

    Args:
        config: the settings to decide by.
        checks: the checks of the run, from its journal.
        read_records: returns the checks with their masks, as far as they are saved; called only if
            the window reaches further back than the journal's distances.

    Raises:
        ConfigError: masks are needed, and there are none; or the package of the rule is missing.
    """
    require_extras(extras_of_rule(config))
    curve = _within(config.window, checks)
    if curve is None:
        records = read_records()
        if not records:
            most = max(len(line.distances) for line in checks)
            raise ConfigError(
                f"search.window {config.window}: needs the masks of the checks, and the run has no "
                f"checkpoint; its journal has the distances for windows up to {most + 1}"
            )
        curve = _between(config.window, records)
    return Replay(
        config=config,
        checks=checks[: len(curve)],
        curve=curve,
        decisions=[decide(config, curve[: number + 1]) for number in range(len(curve))],
        num_checks=len(checks),
    )


def _within(window: int, checks: Sequence[CheckLine]) -> list[tuple[float, ...]] | None:
    """The journal's distances to the masks in a window; None if the window is longer than the
    run's."""
    older = window - 1
    if any(len(line.distances) < min(number, older) for number, line in enumerate(checks)):
        return None
    return [line.distances[max(0, len(line.distances) - older) :] for line in checks]


def _between(length: int, records: Sequence[CheckRecord]) -> list[tuple[float, ...]]:
    """The distances between masks."""
    window, curve = Window(length), []
    for record in records:
        window.push(record.mask)
        curve.append(window.distances)
    return curve
