"""Run: what every rank does for a combination, with an engine and by hand at the same time."""

from __future__ import annotations

from tests.matrix.combination import INVARIANTS, Combination
from tests.matrix.combinations import COMBINATIONS
from tests.matrix.drawing import draw_and_train_on
from tests.matrix.frozen import FADE_STEPS
from tests.matrix.pair import Pair
from tests.settings import at_once
from tests.tables.findings import Findings

__all__ = ["run"]

# Between two checks.  The last fade needs time to end, a step to be listened to, one to send less.
_STEPS = 2
_LAST_STEPS = {"hold": 2, "free": 2, "remove": FADE_STEPS + 3}


def run(names: tuple[str, ...]) -> dict[str, Findings]:
    """All that is seen of these combinations on this rank."""
    return {name: _run(COMBINATIONS[name]) for name in names}


def _run(combination: Combination) -> Findings:
    findings = Findings()
    for rule in combination.rules:
        with findings.of(*(invariant for invariant in INVARIANTS if invariant != "off")):
            _search_truncate_draw(combination, rule, findings)
    if combination.why_not("off") is None:
        with findings.of("off"):
            _without_truncation(combination, findings)
    return findings


def _search_truncate_draw(combination: Combination, rule: str, findings: Findings) -> None:
    truncation = {"frozen_weights": rule, **combination.truncation}
    if rule == "remove":
        truncation |= at_once(FADE_STEPS)
    pair = Pair(combination, truncation, findings, f"{rule}, ")
    pair.train(combination.search_steps)
    *first, last = combination.generations(rule)
    for dropped in first:
        pair.freeze(dropped)
        pair.train(_STEPS)
    pair.freeze(last)
    pair.train(_LAST_STEPS[rule])
    with findings.of("draw"):
        draw_and_train_on(pair)


def _without_truncation(combination: Combination, findings: Findings) -> None:
    """The engine searches, and that is all."""
    pair = Pair(combination, {"mode": "off"}, findings, "off, ")
    for _ in range(3):
        pair.train(1)
        pair.engine.check()
