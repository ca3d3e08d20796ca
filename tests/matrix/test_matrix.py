"""Truncation's invariants under everything that people train with: a test for every cell.

A combination runs once, in one call of all its ranks, and is looked at from all sides; the table is
printed at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.matrix.combinations import COMBINATIONS
from tests.matrix.findings import Findings
from tests.matrix.run import run
from tests.ranks import Outcome, Ranks

pytestmark = pytest.mark.slow("trains every combination on real ranks")

Look = Callable[[str, str], list[Findings]]


def cells(invariant: str) -> pytest.MarkDecorator:
    """The combinations for which an invariant has a meaning."""
    known = {name: row.wrong.get(invariant) for name, row in COMBINATIONS.items()}
    parameters = [
        pytest.param(name, marks=[pytest.mark.xfail(reason=why, strict=True)] if why else [])
        for name, why in known.items()
        if COMBINATIONS[name].why_not(invariant) is None
    ]
    return pytest.mark.parametrize("name", parameters)


@pytest.fixture(scope="session")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Outcome]]:
    """How the ranks of a combination ended; every combination runs once."""
    ranks = Ranks(tmp_path_factory.mktemp("matrix"))
    ended: dict[str, list[Outcome]] = {}

    def outcomes_of(name: str) -> list[Outcome]:
        if name not in ended:
            size = COMBINATIONS[name].world_size
            ended[name] = ranks.outcomes(size, run, name)
        return ended[name]

    return outcomes_of


@pytest.fixture
def look(
    outcomes_of: Callable[[str], list[Outcome]], record_property: Callable[[str, Any], None]
) -> Look:
    """``look(combination, invariant)``: nothing was wrong on any rank; what each has found."""

    def look(name: str, invariant: str) -> list[Findings]:
        record_property("cell", (name, invariant))
        everyone = []
        for outcome in outcomes_of(name):
            assert outcome.exitcode == 0, str(outcome)
            wrong = outcome.value.wrong.get(invariant, [])
            assert not wrong, f"{len(wrong)} on rank {outcome.rank}:\n" + "\n".join(wrong[:5])
            everyone.append(outcome.value)
        return everyone

    return look


def _assert_compared(everyone: list[Findings], invariant: str) -> None:
    assert all(findings.num_comparisons[invariant] for findings in everyone), "nothing compared"


@cells("agree")
def test_all_ranks_hold_the_same_masks_and_weights(look: Look, name: str) -> None:
    first, *others = look(name, "agree")
    assert first.masks and first.weights
    for other in others:
        assert other.masks == first.masks
        assert other.weights == first.weights


@cells("live")
def test_live_slices_train_as_under_plain_ddp(look: Look, name: str) -> None:
    _assert_compared(look(name, "live"), "live")


@cells("held")
def test_frozen_slices_stay_or_fade_exactly(look: Look, name: str) -> None:
    _assert_compared(look(name, "held"), "held")


@cells("state")
def test_a_thawed_channel_finds_its_optimizer_state(look: Look, name: str) -> None:
    _assert_compared(look(name, "state"), "state")


@cells("bytes")
def test_only_live_elements_are_sent(look: Look, name: str) -> None:
    _assert_compared(look(name, "bytes"), "bytes")


@cells("draw")
def test_the_drawn_network_is_the_masked_one_and_trains_on(look: Look, name: str) -> None:
    _assert_compared(look(name, "draw"), "draw")


@cells("schedule")
def test_schedulers_and_averages_go_on(look: Look, name: str) -> None:
    _assert_compared(look(name, "schedule"), "schedule")


@cells("off")
def test_without_truncation_nothing_changes(look: Look, name: str) -> None:
    _assert_compared(look(name, "off"), "off")


def test_masks_do_change_where_they_are_said_to(
    outcomes_of: Callable[[str], list[Outcome]],
) -> None:
    """Or the row would say nothing about thawing and freezing anew."""
    masks = outcomes_of("another mask every check")[0].value.masks
    num_checks = len(COMBINATIONS["another mask every check"].generations("hold"))
    assert all(masks[number] != masks[number + 1] for number in range(num_checks - 1))
