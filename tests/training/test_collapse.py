"""No run ends at chance without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import Driver, Run, small_data
from tests.faults.trainers import small_trainer
from tests.ranks import Ranks
from worm_dist import CollapseError
from worm_dist.training.evaluation import EvalResult


def _trained(settings: dict[str, Any]) -> dict[str, Any]:
    return small_trainer(**settings).run().as_dict()


@pytest.mark.parametrize("preset", ["dense", "worm"])
def test_a_network_that_decays_to_nothing_stops_every_rank(ranks: Ranks, preset: str) -> None:
    """Weights that lose nine tenths of themselves in every step."""
    optimizer = {"lr": 0.1, "momentum": 0.0, "weight_decay": 9.0}
    never = {"elbow": {"latest": None}}  # a check while channels leave would tell it earlier
    settings = {"preset": preset, "epochs": 4, "optimizer": optimizer, "search": never}
    one, other = ranks.outcomes(2, _trained, settings)
    assert one.error == other.error == "CollapseError", str(one)
    assert one.text == other.text
    assert "the network is no better than a constant answer: training loss" in one.text
    assert "all outputs are the same" in one.text and "lower learning rate" in one.text


def _judged(settings: dict[str, Any]) -> list[str]:
    """What is said of a test at chance with different pasts."""
    trainer = small_trainer(**settings)
    lost = EvalResult(0.1, 2.3, chance=0.1, chance_loss=2.3, num_samples=360, output_varies=True)
    better = EvalResult(0.5, 1.6, chance=0.1, chance_loss=2.3, num_samples=360, output_varies=True)
    said = []
    for scores, loss, drawn in (
        ((lost,), 2.3, None),  # it has not learnt yet
        ((better, lost), 1.5, None),  # it still learns: statistics lag behind
        ((better, lost), 2.3, 0.5),  # right after a published draw
        ((better, lost), 2.3, None),
    ):
        trainer._position.has_learnt, trainer.result.ticket_epoch = False, drawn
        try:
            for score in scores:
                trainer._require_better_than_chance(score, loss if score is lost else 1.6)
            said.append("")
        except CollapseError as error:
            said.append(str(error))
    return said


def test_what_was_learnt_must_not_be_lost_for_good(ranks: Ranks) -> None:
    for *fine, lost in ranks(2, _judged, {}):
        assert fine == ["", "", ""]
        assert "epoch 1, step 0: the network is no better than a constant answer" in lost


def test_what_has_never_been_learnt_is_said_at_the_end(ranks: Ranks) -> None:
    settings = {"preset": "dense", "epochs": 1, "optimizer": {"lr": 1e-9}}
    for result in ranks(2, _trained, settings):
        assert result["status"] == "dense" and result["at_chance"] is True


def _trained_with_many_tests(settings: dict[str, Any]) -> dict[str, Any]:
    return small_trainer(small_data(0, num_test=200), **settings).run().as_dict()


@pytest.mark.fault(37, "a network that never learns")
def test_what_has_never_been_learnt_is_no_result(ranks: Ranks) -> None:
    """A run at .10 ended with 0.  With 16 images, above, that may be bad luck."""
    settings = {"preset": "dense", "epochs": 1, "optimizer": {"lr": 1e-9}}
    for outcome in ranks.outcomes(2, _trained_with_many_tests, settings):
        assert outcome.error == "CollapseError"
        assert "epoch 1, step 8: the network is no better than a constant answer" in outcome.text
        assert "train for more epochs, or with another optimizer.lr" in outcome.text


@pytest.mark.parametrize(
    ("accuracy", "output_varies", "is_chance"),
    [(0.10, True, True), (0.14, True, True), (0.16, True, False), (0.99, False, True)],
)
def test_chance_is_what_a_constant_answer_and_luck_come_to(
    accuracy: float, output_varies: bool, is_chance: bool
) -> None:
    """Of 360 images of ten classes."""
    score = EvalResult(
        accuracy, 2.0, chance=0.1, chance_loss=2.3, num_samples=360, output_varies=output_varies
    )
    assert score.is_chance is is_chance


@pytest.mark.fault(37, "a learning rate and a penalty that are far too high")
@pytest.mark.parametrize("preset", ["worm", "early-bird"])
def test_a_collapsed_run_has_an_exit_code_of_its_own(tmp_path: Path, preset: str) -> None:
    """It was a ticket, with exit code 0."""
    settings = {"preset": preset, "epochs": 4, "optimizer.lr": 5, "search.l1": 1}
    settings |= {"search.elbow.latest": "null"} if preset == "worm" else {}
    ends = Driver(tmp_path)(2, Run((), settings))
    assert [end.exitcode for end in ends] == [7, 7], ends
    lines = [line for end in ends for line in end.errors]
    assert lines
    for line in lines:
        assert "the network is no better than a constant answer" in line
        assert "lower learning rate" in line and "search.l1" in line
