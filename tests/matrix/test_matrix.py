"""Truncation's invariants under everything that people train with: a test for every cell.

A combination runs once, in one call of all its ranks, and is looked at from all sides; the table is
printed at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.matrix.combination import Combination
from tests.matrix.combinations import COMBINATIONS
from tests.matrix.run import run
from tests.ranks import Ranks
from tests.tables.runs import Runs

pytestmark = pytest.mark.slow("trains every combination on real ranks")

Look = Callable[[str, str], None]


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
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs[Combination]:
    return Runs(Ranks(tmp_path_factory.mktemp("matrix")), run, COMBINATIONS)


@pytest.fixture
def look(runs: Runs[Combination], record_property: Callable[[str, Any], None]) -> Look:
    """``look(combination, invariant)``: it holds on all ranks; the table says so."""

    def look(name: str, invariant: str) -> None:
        record_property("cell", (name, invariant))
        runs.look(name, invariant)

    return look


@cells("agree")
def test_all_ranks_hold_the_same_masks_and_weights(
    look: Look, runs: Runs[Combination], name: str
) -> None:
    look(name, "agree")
    assert runs.findings(name)[0].masks


@cells("live")
def test_live_slices_train_as_under_plain_ddp(look: Look, name: str) -> None:
    look(name, "live")


@cells("held")
def test_frozen_slices_stay_or_fade_exactly(look: Look, name: str) -> None:
    look(name, "held")


@cells("state")
def test_a_thawed_channel_finds_its_optimizer_state(look: Look, name: str) -> None:
    look(name, "state")


@cells("bytes")
def test_only_live_elements_are_sent(look: Look, name: str) -> None:
    look(name, "bytes")


@cells("draw")
def test_the_drawn_network_is_the_masked_one_and_trains_on(look: Look, name: str) -> None:
    look(name, "draw")


@cells("schedule")
def test_schedulers_and_averages_go_on(look: Look, name: str) -> None:
    look(name, "schedule")


@cells("off")
def test_without_truncation_nothing_changes(look: Look, name: str) -> None:
    look(name, "off")


def test_masks_do_change_where_they_are_said_to(runs: Runs[Combination]) -> None:
    """Or the row would say nothing about thawing and freezing anew."""
    masks = runs.findings("another mask every check")[0].masks
    num_checks = len(COMBINATIONS["another mask every check"].generations("hold"))
    assert all(masks[number] != masks[number + 1] for number in range(num_checks - 1))
