"""Whole runs: no removal destroys a network in silence; and the ledger that they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import worm_dist
from tests.ranks import NO_GROUP, Ranks
from worm_dist.__main__ import main
from worm_dist.bench.ledger.grid import grid_specs, outcome, summary
from worm_dist.bench.ledger.row import Key, Row, append, read_rows
from worm_dist.bench.ledger.rule import RULES, triggered_at
from worm_dist.bench.ledger.run import RunSpec, one_rank, run
from worm_dist.bench.ledger.subject import SUBJECTS
from worm_dist.bench.ledger.table import markdown
from worm_dist.bench.ledger.training import train
from worm_dist.models.vgg import Vgg


def _cells(subject: str) -> list[Row]:
    """A part of the grid."""
    with one_rank():
        return [
            train(SUBJECTS[spec.subject], spec.rule, spec.prune_ratio, spec.seed, epochs=10)
            for spec in grid_specs([subject], [3], [0.9])
            if not spec.rule.name.startswith("four epochs")
        ]


@pytest.mark.slow("trains whole runs under absurd settings")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("subject", ["vgg, digits", "resnet, digits"])
def test_no_removal_destroys_a_network(ranks: Ranks, subject: str) -> None:
    """At the default's pace, all at once, and as slowly as one fade may be; nine tenths of the
    channels."""
    (outcome_of_rank,) = ranks.outcomes(NO_GROUP, _cells, subject, wall_limit=180)
    assert outcome_of_rank.exitcode == 0, str(outcome_of_rank)
    rows = outcome_of_rank.value
    assert len(rows) == 3
    for row in rows:
        assert outcome(row) in ("trains on", "paused, trains on"), row
        assert row.final > 0.6, row  # a network that was destroyed stays at a tenth
        assert row.ticket_epoch is not None and row.before_draw == row.after_draw, row
        assert row.change_at_draw < 1e-4


def _digits_with_noise() -> tuple[list[float], float]:
    """Losses of stretches of a hundred steps, and the accuracy at the end."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    classes = torch.tensor(digits.target)
    torch.manual_seed(1)
    network = Vgg(10, 1, [16, 16, "M", 32, 32])
    engine = worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        worm_dist.WormConfig(**triggered_at(1)),
        example_inputs=images[:1],
        steps_per_epoch=400,
    )
    random = torch.Generator().manual_seed(1)
    losses: list[float] = []
    while engine.phase != "ticket" or len(losses) % 100 or engine.step < 900:
        batch = torch.randint(1437, (32,), generator=random)
        noise = 0.5 * torch.randn(32, 1, 8, 8, generator=random)
        loss = nn.functional.cross_entropy(engine.model(images[batch] + noise), classes[batch])
        engine.watch(loss)
        (loss + engine.penalty()).backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        losses.append(loss.item())
        verdict = engine.check()
        if engine.phase != "ticket" and (verdict.stage or verdict.ticket):
            engine.draw()
    network.eval()
    right = network(images[1437:]).argmax(dim=1) == classes[1437:]
    means = torch.tensor(losses).view(-1, 100).mean(dim=1).tolist()
    return means, float(right.float().mean())


@pytest.mark.slow("trains a run of a long epoch")
@pytest.mark.timeout(150)
def test_an_epoch_of_400_steps_ends_with_a_network_that_has_learnt(ranks: Ranks) -> None:
    """All dropped channels faded together over an epoch, and the network lived on them until they
    were zero: at the end of a long epoch the loss rose to that of guessing."""
    (outcome_of_rank,) = ranks.outcomes(NO_GROUP, _digits_with_noise, wall_limit=140)
    assert outcome_of_rank.exitcode == 0, str(outcome_of_rank)
    losses, accuracy = outcome_of_rank.value
    elbow = 4
    assert max(losses[elbow:]) < 1.6 * losses[elbow - 1]
    assert accuracy > 0.75


def _row(rule: str, seed: int, *accuracies: float, **figures: Any) -> Row:
    both = list(accuracies)
    return Row(Key("vgg, digits", rule, 0.5, seed), both, both, **figures)


def test_a_table_compares_seed_by_seed() -> None:
    drawn = {"elbow_epoch": 1.0, "ticket_epoch": 2.0, "after_draw": 0.70, "run_flops": 0.4}
    rows = [
        _row("dense", 1, 0.5, 0.8, 0.9),
        _row("dense", 2, 0.5, 0.7, 0.8),
        _row("worm", 1, 0.74, 0.75, 0.89, **drawn),
        _row("worm", 2, 0.74, 0.70, 0.81, **drawn),
        _row("early", 1, error="CollapseError: why"),
    ]
    header, _, *lines = markdown(rows).splitlines()[2:]
    columns = [column.strip() for column in header.split("|")[1:-1]]
    dense, worm, early, _, failure = lines
    cells = dict(zip(columns, (cell.strip() for cell in worm.split("|")[1:-1]), strict=True))
    assert cells["seeds"] == "2" and cells["final"] == "0.8500 (0.8100 to 0.8900)"
    assert cells["to dense (points)"] == "0.00 (-1.00 to 1.00)"
    assert cells["deepest under dense"] == "2.5 (0.0 to 5.0)"
    assert cells["fall within the epoch before"] == "4.0"
    assert cells["run FLOPs"] == "0.400"
    assert dense.startswith("| dense | 2 | – | – | 0.8500")
    assert early.startswith("| early | 1 |") and failure == "- early, seed 1: CollapseError: why"


def test_rows_are_read_back_and_a_line_cut_short_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    assert read_rows(path) == []
    rows = [_row("worm", 1, 0.5, 0.6, losses=[1.0, 0.5]), _row("worm", 2, 0.4)]
    for row in rows:
        append(path, row)
    with path.open("a") as file:
        file.write('{"key": {"subject": "vgg')
    assert read_rows(path) == rows


@pytest.mark.slow("trains whole runs")
@pytest.mark.timeout(150)
def test_what_is_there_is_not_trained_again(tmp_path: Path) -> None:
    specs = [
        RunSpec("vgg, digits", RULES[rule], 0.5, seed=1, epochs=4) for rule in ("dense", "one shot")
    ]
    there = _row("dense", 1, 0.5, 0.6)
    append(tmp_path / "ledger.jsonl", there)
    both = run(specs, tmp_path, num_workers=1)
    assert both[0] == there and [row.key.rule for row in both] == ["dense", "one shot"]
    assert both[1].ticket_epoch == 3 and both[1].run_flops < 1 > both[1].run_bytes
    assert "| one shot | 1 |" in (tmp_path / "ledger.md").read_text()
    assert run(specs, tmp_path, num_workers=1) == both


def test_outcomes_are_told_apart() -> None:
    cells = {
        "trains on": _row("default, from epoch 3", 1, 0.9, ticket_epoch=3.0, removed_fraction=1.0),
        "paused, trains on": _row(
            "default, from epoch 3", 2, 0.8, ticket_epoch=3.0, removed_fraction=1.0, paused_steps=9
        ),
        "still leaving": _row("default, from epoch 3", 3, 0.9, removed_fraction=0.5),
        "at chance, in silence": _row("default, from epoch 3", 4, 0.1, ticket_epoch=3.0),
        "CollapseError": _row("default, from epoch 3", 5, error="CollapseError: dead"),
    }
    for what, row in cells.items():
        assert outcome(row) == what
    line = summary(list(cells.values())).splitlines()[-1]
    assert line.startswith("| vgg, digits | default | 5 |") and "1 CollapseError" in line
    assert line.endswith("| 0.100, 0.675 |")


def test_unknown_names_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ledger", "--rule", "warm"]) == 2
    assert "there is no rule 'warm'; there are dense, " in capsys.readouterr().err
