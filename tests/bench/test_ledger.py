"""Whole runs: no removal destroys a network in silence; and the ledger that they are kept in."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import worm_dist
from tests.ranks import NO_GROUP, Ranks
from worm_dist.__main__ import main
from worm_dist.bench.json_lines import append
from worm_dist.bench.ledger.grid import grid_specs, outcome, summary
from worm_dist.bench.ledger.row import Key, Row, read_rows
from worm_dist.bench.ledger.rule import RULES, triggered_at
from worm_dist.bench.ledger.run import missing
from worm_dist.bench.ledger.spec import Selection
from worm_dist.bench.ledger.table import markdown
from worm_dist.bench.ledger.training import train
from worm_dist.bench.local_ranks import one_rank
from worm_dist.errors import CheckpointError
from worm_dist.models.vgg import Vgg

QUICK = ("bench", "ledger", "--quick", "--subject", "vgg, digits", "--epochs", "3")


def _cells(subject: str) -> list[Row]:
    """A part of the grid."""
    with one_rank():
        return [
            train(replace(spec, epochs=10))
            for spec in grid_specs([subject], [3], [0.9])
            if not spec.rule.name.startswith("four epochs")
        ]


@pytest.mark.slow("trains whole runs under absurd settings")
@pytest.mark.parametrize("subject", ["vgg, digits", "resnet, digits"])
def test_no_removal_destroys_a_network(ranks: Ranks, subject: str) -> None:
    """At the default's pace, all at once, and as slowly as one fade may be; nine tenths of the
    channels."""
    (outcome_of_rank,) = ranks.outcomes(NO_GROUP, _cells, subject)
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
def test_an_epoch_of_400_steps_ends_with_a_network_that_has_learnt(ranks: Ranks) -> None:
    """All dropped channels faded together over an epoch, and the network lived on them until they
    were zero: at the end of a long epoch the loss rose to that of guessing."""
    (outcome_of_rank,) = ranks.outcomes(NO_GROUP, _digits_with_noise)
    assert outcome_of_rank.exitcode == 0, str(outcome_of_rank)
    losses, accuracy = outcome_of_rank.value
    elbow = 4
    assert max(losses[elbow:]) < 1.6 * losses[elbow - 1]
    assert accuracy > 0.75


def _row(rule: str, seed: int, *accuracies: float, ratio: float = 0.5, **figures: Any) -> Row:
    both, epochs = list(accuracies), range(1, 1 + len(accuracies))
    key = Key("vgg, digits", rule, 0.0 if rule == "dense" else ratio, seed, epochs=3)
    as_dense = {"sent": list(map(float, epochs)), "computed": list(map(float, epochs))}
    return Row(key, both, both, **{**as_dense, **figures})


def _cells_of(table: str) -> dict[str, dict[str, str]]:
    """The cells of the first table, by run and column."""
    header, _, *lines = table.split("\n\n")[1].splitlines()
    columns = [column.strip() for column in header.split("|")[1:-1]]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {line[0]: dict(zip(columns, line, strict=True)) for line in cells}


def test_a_table_compares_seed_by_seed() -> None:
    drawn: dict[str, Any] = {"elbow_epoch": 1.0, "ticket_epoch": 2.0}
    drawn |= {"before_pruning": 0.74, "after_draw": 0.70}
    computed: dict[str, Any] = {"computed": [1.0, 1.1, 1.2], "test_accuracy": 0.8}
    rows = [
        _row("dense", 1, 0.5, 0.8, 0.9, test_accuracy=0.85),
        _row("dense", 2, 0.5, 0.7, 0.8, test_accuracy=0.85),
        _row("worm", 1, 0.74, 0.75, 0.89, **drawn, **computed),
        _row("worm", 2, 0.74, 0.70, 0.81, **drawn, **computed),
        _row("worm: uniform at equal FLOPs", 1, 0.9, 0.9, 0.87, test_accuracy=0.7),
        _row("worm: random channels", 1, 0.9, 0.9, 0.86, **drawn),
        _row("early", 1, 0.9, error="CollapseError: why"),
        _row("early", 2, 0.9, 0.9, 0.9),
    ]
    table = markdown(rows)
    cells = _cells_of(table)
    worm = cells["worm"]
    assert list(worm)[2:9] == [
        "accuracy",
        "to dense",
        "to uniform at equal FLOPs",
        "run FLOPs",
        "run bytes",
        "FLOPs",
        "parameters",
    ]
    assert worm["seeds"] == "2" and worm["accuracy"] == "0.8500 ± 0.0566"
    assert worm["to dense"] == "+0.00 ± 1.41 (2)"
    assert worm["to uniform at equal FLOPs"] == "+2.00 (1)"
    assert worm["run FLOPs"] == "0.400 ± 0.000" and worm["run bytes"] == "1.000 ± 0.000"
    assert worm["test to dense"] == "-5.00 ± 0.00 (2)"
    assert worm["test to uniform at equal FLOPs"] == "+10.00 (1)"
    assert worm["epochs to recover"] == "1.00 ± 0.00"
    assert worm["deepest under dense (points)"] == "2.5 ± 3.5"
    assert cells["dense"]["to dense"] == "–" and cells["dense"]["accuracy"] == "0.8500 ± 0.0707"
    assert cells["worm: random channels"]["to uniform at equal FLOPs"] == "-1.00 (1)"
    assert [line for line in table.splitlines() if line.startswith("| worm | ")][1:] == [
        "| worm | uniform at equal FLOPs | +2.00 (1) | +10.00 (1) |",
        "| worm | random channels | +3.00 (1) | – |",
    ]
    # A run that an error ended is not in the means.
    assert cells["early"]["seeds"] == "1" and cells["early"]["accuracy"] == "0.9000"
    assert "- early, seed 1: CollapseError: why" in table.splitlines()


def test_every_ratio_is_compared_with_the_one_dense_run() -> None:
    rows = [
        _row("dense", 1, 0.5, 0.8, 0.9),
        _row("worm", 1, 0.7, 0.75, 0.89, ratio=0.3),
        _row("worm", 1, 0.7, 0.75, 0.88, ratio=0.7),
    ]
    assert [line for line in markdown(rows).splitlines() if line.startswith("##")] == [
        "## vgg, digits, p = 0.3, 3 epochs",
        "## vgg, digits, p = 0.7, 3 epochs",
    ]
    assert _cells_of(markdown(rows))["worm"]["to dense"] == "-1.00 (1)"
    assert list(_cells_of(markdown(rows[:1]))) == ["dense"]


def test_recovery_counts_from_the_draw() -> None:
    drawn = {"ticket_epoch": 1.5, "before_pruning": 0.8, "after_draw": 0.5}
    assert _row("worm", 1, 0.8, 0.7, 0.8, **drawn).recovery == 1.5
    assert _row("worm", 1, 0.8, 0.7, 0.79, **drawn).recovery is None
    assert _row("worm", 1, 0.8, 0.7, 0.7, **{**drawn, "after_draw": 0.8}).recovery == 0
    assert _row("worm", 1, 0.8, 0.7, 0.8).recovery is None


def test_rows_are_read_back_and_a_line_cut_short_is_not_one(tmp_path: Path) -> None:
    """The first row after a kill was appended to the line that the kill had cut short, and lost."""
    path = tmp_path / "new" / "ledger.jsonl"
    assert read_rows(path) == []
    rows = [
        _row("worm", 1, 0.5, 0.6, losses=[1.0, 0.5], widths={"conv1": 8}),
        _row("worm", 2, 0.4),
        _row("worm", 3, 0.3),
    ]
    for row in rows[:2]:
        append(path, row)
    with path.open("a") as file:
        file.write('{"key": {"subject": "vgg')
    assert read_rows(path) == rows[:2]
    append(path, rows[2])
    assert read_rows(path) == rows


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    key = '{"subject": "vgg, digits", "rule": "worm", "prune_ratio": 0.5, "seed": 1}'
    path.write_text(f'{{"key": {key}, "accuracies": [0.5]}}\n')
    with pytest.raises(CheckpointError, match=r"not written by this version .*'epochs'"):
        read_rows(path)


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "warm"], "there is no rule 'warm'; there are dense, "),
        (["--control", "none"], "there is no control 'none'; there are uniform at equal FLOPs, "),
        (["--of", "worm, trigger 5 %"], "there is no pruning rule 'worm, trigger 5 %'; there are "),
        (["--importance", "luck"], "search.importance"),
        (["--ratio", "0.95"], "prune_ratio 0.95 and min_keep_ratio 0.1 contradict"),
        (["--epochs", "0"], "--epochs 0; give at least 1"),
        (["--quick", "--subject", "vgg, fashion 10k"], "no subject is left; --quick takes"),
        (["--trigger", "0"], "--trigger 0; give more than 0 and less than 100"),
        (["--trigger", "100"], "--trigger 100; give more than 0 and less than 100"),
        (["--ratio", "0"], "--ratio 0; give more than 0 and less than 1"),
        (["--duration", "100"], "--duration 100; give more than 0 and less than 100"),
        (["--budget", "flops"], "--budget: 'flops' is not a share of something; write flops=0.25"),
        (["--budget", "flops=2"], "search.budget.flops: Input should be less than or equal to 1"),
    ],
)
def test_what_does_not_exist_is_told(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "ledger", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _selection(**changes: Any) -> Selection:
    plain = Selection(
        subjects=["vgg, digits"],
        rules=["dense", "worm", "worm, at once"],
        ratios=[0.5],
        seeds=[1],
        controls=["uniform at equal FLOPs", "ticket from scratch"],
        of=["worm"],
        epochs=20,
    )
    return replace(plain, **changes)


def test_controls_come_after_the_rules_that_they_are_matched_to(tmp_path: Path) -> None:
    specs = list(_selection(ratios=[0.3, 0.5]).specs())
    assert [(spec.rule.name, spec.prune_ratio) for spec in specs] == [
        ("dense", 0.0),
        ("worm", 0.3),
        ("worm, at once", 0.3),
        ("worm", 0.5),
        ("worm, at once", 0.5),
        ("worm: uniform at equal FLOPs", 0.3),
        ("worm: ticket from scratch", 0.3),
        ("worm, at once: uniform at equal FLOPs", 0.3),
        ("worm: uniform at equal FLOPs", 0.5),
        ("worm: ticket from scratch", 0.5),
        ("worm, at once: uniform at equal FLOPs", 0.5),
    ]
    seen = set[Key]()
    for spec in specs:
        assert spec.parent is None or spec.parent in seen
        seen.add(spec.key)
    assert len(seen) == len(specs) and missing(specs, tmp_path) == specs


def test_variants_are_those_of_the_worm_rules() -> None:
    variants = _selection(
        rules=["early-bird", "worm"],
        triggers=[5, 30],
        durations=[25],
        importances=["weight_norm"],
        thresholds=["global", "layer"],
        controls=[],
    )
    specs = {spec.rule.name: spec for spec in variants.specs()}
    assert list(specs) == ["early-bird", *variants.pruning_rules[1:]]
    assert variants.pruning_rules[1:] == [
        f"worm, trigger {trigger} %, duration 25 %, weight_norm, {threshold} threshold"
        for trigger in (5, 30)
        for threshold in ("global", "layer")
    ]
    rule = specs["worm, trigger 30 %, duration 25 %, weight_norm, layer threshold"].rule
    assert not hasattr(rule, "of")
    search = rule.config(0.5).search
    assert (search.importance, search.threshold) == ("weight_norm", "layer")
    assert (search.every.count, search.elbow.min_masks) == (1.0, 6)  # 30 % of 20 epochs
    assert str(rule.config(0.5).truncation.removal.duration) == "5ep"
    assert RULES["worm"].config(0.5).search.threshold == "layer"
    at_once = _selection(rules=["worm, at once"], durations=[25, 50])
    assert at_once.pruning_rules == ["worm, at once"]  # has no duration


def test_a_budget_takes_the_place_of_the_ratios() -> None:
    selection = _selection(
        rules=["dense", "early-bird", "worm"],
        ratios=[0.3, 0.5],
        budgets=["flops=0.25", "parameters=0.5"],
        controls=["uniform at equal FLOPs"],
    )
    specs = list(selection.specs())
    rules = [(spec.rule.name, spec.prune_ratio) for spec in specs]
    assert rules[:5] == [
        ("dense", 0.0),
        ("early-bird", 0.3),
        ("early-bird", 0.5),
        ("worm, flops=0.25", 0.0),
        ("worm, parameters=0.5", 0.0),
    ]
    assert rules[5:] == [(f"{name}: uniform at equal FLOPs", p) for name, p in rules[1:5]]
    rule = specs[3].rule
    assert not hasattr(rule, "of")
    assert rule.config(0.0).search.budget.flops == 0.25


@pytest.mark.parametrize("epoch", [0.8, 1.0, 2.4, 4.8, 7.2])
def test_a_trigger_is_met_to_half_a_step_of_each_check(epoch: float) -> None:
    search = RULES["worm"].changed("pinned", triggered_at(epoch)).config(0.5).search
    num_masks = search.masks_before_elbow
    assert num_masks >= 2
    steps = num_masks * search.every.steps(1000, None)
    assert steps == pytest.approx(1000 * epoch, abs=num_masks / 2)


@pytest.mark.slow("trains a ledger, twice from the start and once from its rows")
def test_a_killed_ledger_goes_on_and_is_written_again_from_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [*QUICK, "--rule", "dense", "--rule", "worm, at once", "--of", "worm, at once"]
    words += ["--control", "uniform at equal FLOPs", "--control", "random channels"]
    words += ["--workers", "1", "--trigger", "40", "--out", str(out)]
    words[words.index("--of") + 1] = "worm, at once, trigger 40 %"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "worm_dist", *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    next(line for line in process.stdout if "dense" in line)  # the first row is done
    os.killpg(process.pid, signal.SIGKILL)  # its worker too
    process.wait()
    process.stdout.close()
    (dense,) = read_rows(out / "ledger.jsonl")
    assert not (out / "ledger.md").exists()

    assert main(words) == 0
    capsys.readouterr()
    rows = {row.key.rule: row for row in read_rows(out / "ledger.jsonl")}
    name = "worm, at once, trigger 40 %"
    assert list(rows) == [
        "dense",
        name,
        f"{name}: uniform at equal FLOPs",
        f"{name}: random channels",
    ]
    assert rows["dense"] == dense and not any(row.error for row in rows.values())
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert written.keys() == {
        "ledger.jsonl",
        "ledger.md",
        "journal.jsonl",
        "trade-off.png",
        "course.png",
    }
    assert written["journal.jsonl"].count(b"\n") == 2
    command = next(line for line in written["ledger.md"].decode().splitlines() if "python" in line)
    assert "--trigger 40.0 --epochs 3" in command and command.endswith(f"--out {out}")

    (out / "ledger.md").unlink()
    (out / "course.png").unlink()
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written


def test_a_sweep_is_one_command(tmp_path: Path) -> None:
    """All rows are there, so nothing is trained; the page says how it is written again."""
    sweep = Selection(
        subjects=["vgg, digits"],
        rules=["dense", "worm"],
        ratios=[0.3, 0.7],
        seeds=[1],
        controls=[],
        of=[],
        triggers=[5, 45],
        importances=["weight_norm"],
        epochs=3,
    )
    out = tmp_path / "out"
    for spec in sweep.specs():
        row = _row(spec.rule.name, 1, 0.5, 0.8, 0.9, ratio=spec.prune_ratio)
        append(out / "ledger.jsonl", row)
    words = ["--rule", "dense", "--rule", "worm", "--subject", "vgg, digits", "--no-controls"]
    words += ["--ratio", "0.3", "--ratio", "0.7", "--seed", "1", "--epochs", "3"]
    words += ["--trigger", "5", "--trigger", "45", "--importance", "weight_norm"]
    assert main(["bench", "ledger", *words, "--out", str(out)]) == 0
    page = (out / "ledger.md").read_text()
    for title in ("## vgg, digits, p = 0.3, 3 epochs", "## vgg, digits, p = 0.7, 3 epochs"):
        assert title in page
    assert page.count("| worm, trigger 45 %, weight_norm | 1 | 0.9000 |") == 2
    assert not (out / "journal.jsonl").exists()
    command = next(line for line in page.splitlines() if line.startswith("python "))
    (out / "ledger.md").unlink()
    assert main(shlex.split(command)[3:]) == 0
    assert (out / "ledger.md").read_text() == page


def test_the_grid_is_written_from_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for spec in grid_specs(["vgg, digits"], [3], [0.9]):
        row = _row("", 1, 0.8, ticket_epoch=1.0)
        append(tmp_path / "ledger.jsonl", replace(row, key=spec.key))
    words = ["--quick", "--subject", "vgg, digits", "--ratio", "0.9", "--out", str(tmp_path)]
    assert main(["bench", "grid", *words]) == 0
    table = (tmp_path / "ledger.md").read_text()
    assert table in capsys.readouterr().out
    assert "| vgg, digits | at once | 1 | 1 trains on | 0.800, 0.800 |" in table
