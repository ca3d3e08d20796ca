"""The main job as settings say it, on one, two and four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.trainers import small_trainer
from tests.ranks import Ranks
from worm_dist.distributed.init import RankInfo
from worm_dist.engine.engine import Engine
from worm_dist.models import build_model
from worm_dist.training.config_file import read_run_config
from worm_dist.training.reporting.reporter import Report
from worm_dist.training.trainer import Trainer
from worm_dist.verdict import Verdict

pytestmark = pytest.mark.slow("trains whole runs")

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
WIDTHS = [16, 16, "M", 32, 32]
SMALL = (
    ("model.arguments", "{widths: [16, 16, M, 32, 32]}"),
    ("data.batch_size", "128"),
    ("search.elbow.latest", "null"),
)
"""Eleven steps an epoch; the masks alone determine the start."""


class _Digests(Report):
    """What every rank holds after each check."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, str, bool]] = []
        self.sent: list[int] = []

    def check(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        assert engine.mask is not None
        self.sent.append(engine.traffic.sent_bytes)
        self.seen.append((engine.step, engine.mask.digest, str(verdict.phase), verdict.ticket))


def _train(*replaced: tuple[str, str]) -> tuple[Any, ...]:
    config = read_run_config(CONFIG, replaced)
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    digests = _Digests()
    trainer = Trainer(config, place, torch.device("cpu"), digests)
    result = trainer.run()
    mask = trainer.engine.mask
    kept = None if mask is None else {name: mask[name] for name in mask}
    return digests.seen, result.as_dict(), kept, digests.sent


def _run(ranks: Ranks, world_size: int, *replaced: tuple[str, str]) -> Any:
    outcomes = ranks.outcomes(world_size, _train, *replaced)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    seen = [outcome.value[0] for outcome in outcomes]
    assert all(other == seen[0] for other in seen), "the ranks hold different masks"
    return outcomes[0].value


def test_the_ticket_does_not_hang_on_the_number_of_ranks(ranks: Ranks) -> None:
    short = (
        ("epochs", "5"),
        ("truncation.removal.duration", "1ep"),
        ("model.arguments", "{widths: [32, M, 64]}"),
    )
    one, two, four = (_run(ranks, world_size, *short)[1] for world_size in (1, 2, 4))
    for result in (one, two, four):
        assert result["status"] == "ticket"
        assert abs(result["ticket_epoch"] - two["ticket_epoch"]) <= 1
        assert result["accuracy"]["after_draw"] >= 0.5
        assert result["parameters"]["ticket"] <= 0.45 * result["parameters"]["dense"]
        assert result["flops"]["ticket"] < result["flops"]["dense"]


def test_truncated_bytes_are_live_elements_times_four(ranks: Ranks) -> None:
    whole = ("truncation.removal.duration", "8ba"), ("truncation.removal.stage", "1.0")
    alone = ("truncation.removal.fade_steps", "8")
    _, result, kept, sent = _run(ranks, 2, ("epochs", "4"), *SMALL, *whole, alone)
    assert kept is not None
    network = build_model("vgg_small", 10, 1, {"widths": WIDTHS})
    convs = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    head = 32 * 10 + 10
    live = dense = head
    for conv, filters in zip(convs, kept.values(), strict=True):
        of_a_channel = conv.weight[0].numel() + 2  # a filter without bias, scale and shift
        live += int(filters.sum()) * of_a_channel
        dense += len(filters) * of_a_channel
    # The elbow is at check 3; what is frozen and not yet zero is sent no more from then on.
    ticket = result["parameters"]["ticket"]
    assert (result["elbow_epoch"], result["ticket_epoch"]) == (
        3,
        pytest.approx(3 + 8 / 11, abs=1e-3),
    )
    assert sent == [4 * dense] * 3
    assert result["traffic"]["truncated_bytes_per_step"] == 4 * live
    assert result["live_fraction"] == pytest.approx(live / dense)
    assert result["flops"]["mean"] < result["flops"]["dense"]
    assert ticket < live < dense
    assert (
        result["traffic"]["dense_bytes_per_step"] == 4 * dense == 4 * result["parameters"]["dense"]
    )
    assert result["traffic"]["ticket_bytes_per_step"] == 4 * result["parameters"]["ticket"]


@pytest.mark.fault(25, "a search that finds nothing")
def test_a_run_without_a_figure_says_null(ranks: Ranks) -> None:
    """A search that finds nothing must not report a ticket of zero parameters."""
    seen, result, *_ = _run(ranks, 2, ("epochs", "2"), *SMALL)
    assert [ticket for *_, ticket in seen] == [False, False]
    assert result["status"] == "not_found"
    assert result["checks"] == 2
    for part, key in (
        ("parameters", "ticket"),
        ("accuracy", "after_draw"),
        ("seconds", "truncate"),
    ):
        assert result[part][key] is None
    assert result["elbow_epoch"] is result["ticket_epoch"] is result["live_fraction"] is None
    assert "no elbow in 2 checks" in result["reason"]


def test_a_run_that_ends_while_channels_leave_says_how_many(ranks: Ranks) -> None:
    """A schedule longer than the training ended with a network half removed, and no word."""
    longer = ("truncation.removal.duration", "3ep")
    _, result, *_ = _run(ranks, 2, ("epochs", "4"), *SMALL, longer)
    assert (result["status"], result["elbow_epoch"]) == ("not_found", 3)
    assert 0 < result["removed_fraction"] < 1
    assert "truncation started at epoch 3" in result["reason"]
    assert "% of the dropped channels had been removed" in result["reason"]


def _small_run(settings: dict[str, Any]) -> dict[str, Any]:
    return small_trainer(**settings).run().as_dict()


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_phase_without_a_step_has_sent_nothing(ranks: Ranks, epochs: int) -> None:
    """What the step before the phase had sent was taken for its own: where the draw came last, a
    ticket of half of the size sent as much as the dense network.  Here the elbow and the draw are
    at one check, the last of epoch 1."""
    settings = {
        "preset": "worm",
        "epochs": epochs,
        "search": {
            "every": "4ba",
            "window": 2,
            "settled": 0.9,
            "elbow": {"latest": None},
        },
        "truncation": {"frozen_weights": "hold"},
    }
    result, _ = ranks(2, _small_run, settings)
    assert (result["elbow_epoch"], result["ticket_epoch"]) == (1, 1)
    bytes_of = result["traffic"]
    assert bytes_of["dense_bytes_per_step"] == 4 * result["parameters"]["dense"]
    assert bytes_of["truncated_bytes_per_step"] is None
    ticket = 4 * result["parameters"]["ticket"]
    assert bytes_of["ticket_bytes_per_step"] == (None if epochs == 1 else ticket)
    assert None not in result["seconds"].values()


def test_checks_may_come_every_few_steps(ranks: Ranks) -> None:
    # Held, and long enough to be better than chance at the end.
    often = ("search.every", "3ba"), ("search.window", "9"), ("truncation.frozen_weights", "hold")
    seen, result, *_ = _run(ranks, 2, ("epochs", "3"), *SMALL, *often)
    assert [step for step, *_ in seen] == list(range(3, 34, 3))
    assert result["checks"] == len(seen)


def _diverge() -> None:
    _train(("epochs", "3"), ("optimizer.lr", "1e6"))


def test_a_loss_that_is_not_finite_stops_every_rank_alike(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, _diverge)
    assert [outcome.error for outcome in outcomes] == ["NonFiniteError"] * 2
    assert outcomes[0].text == outcomes[1].text
