"""Time to an accuracy: what is composed, counted and compared is what was trained and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import NO_GROUP, Ranks
from worm_dist.__main__ import main
from worm_dist.bench.hooks import HOOKS, POWER_SGD_RANK
from worm_dist.bench.json_lines import append
from worm_dist.bench.ledger.row import Key, Row
from worm_dist.bench.ledger.subject import SUBJECTS
from worm_dist.bench.time_to_accuracy.command import NAMES
from worm_dist.bench.time_to_accuracy.methods import LABELS, counterpart, specs
from worm_dist.bench.time_to_accuracy.page import PAGE, STEP_TIMES, write
from worm_dist.bench.time_to_accuracy.step_times import StepTimes, read_step_times
from worm_dist.bench.time_to_accuracy.table import Results, tables
from worm_dist.errors import CheckpointError

SUBJECT = "vgg, digits"
STEPS = 17
"""Steps of an epoch of the digits."""
EPOCHS = 4
"""Of the runs that are trained; the ticket is drawn in the third."""


def _row(
    rule: str, accuracies: list[float], seed: int = 1, ratio: float = 0.5, **values: float
) -> Row:
    ratio = 0.0 if rule.startswith("dense") else ratio
    epochs = len(accuracies)
    row = Row(Key(SUBJECT, rule, ratio, seed, epochs, 2), accuracies, accuracies)
    row.computed = [0.5 * (epoch + 1) for epoch in range(epochs)]
    row.sent = [0.25 * (epoch + 1) for epoch in range(epochs)]
    row.test_accuracy = accuracies[-1]
    for name, value in values.items():
        setattr(row, name, value)
    return row


def _times(
    rule: str, steps: dict[str, float], check: float = 0.0, removal: float = 0.0
) -> StepTimes:
    ratio = 0.0 if rule.startswith("dense") else 0.5
    means = {phase: 2 * seconds for phase, seconds in steps.items()}
    numbers = dict.fromkeys(steps, 40)
    return StepTimes(SUBJECT, rule, ratio, 2, "100mbit", steps, means, numbers, {}, check, removal)


WORM = _times("worm", {"search": 4.0, "truncate": 2.0, "ticket": 1.0}, check=0.5, removal=8.0)


def test_seconds_are_steps_times_their_seconds_with_checks_and_draws() -> None:
    row = _row("worm", [0.1, 0.2, 0.3, 0.4], elbow_epoch=1.0, ticket_epoch=3.0)
    search, truncate, ticket = 10 * 4.0 + 0.5, 10 * 2.0 + 4.0, 10 * 1.0
    assert WORM.seconds_of(row, 10) == [
        search,
        search + truncate,
        search + 2 * truncate,
        search + 2 * truncate + ticket,
    ]


def test_a_disturbed_run_is_composed_of_means() -> None:
    row = _row("worm", [0.1, 0.2], elbow_epoch=1.0, ticket_epoch=2.0)
    assert WORM.seconds_of(row, 10, disturbed=True)[-1] == 10 * (8.0 + 4.0) + 0.5 + 8.0


def test_a_draw_at_once_is_in_the_epoch_that_ends_with_it() -> None:
    row = _row("early-bird", [0.1, 0.2, 0.3], ticket_epoch=2.0)
    times = _times("early-bird", {"search": 4.0, "ticket": 1.0}, check=0.5, removal=8.0)
    assert times.seconds_of(row, 10) == [40.5, 81.0 + 8.0, 81.0 + 8.0 + 10.0]


def test_without_a_ticket_every_epoch_costs_the_same() -> None:
    times = _times("dense", {"dense": 3.0})
    assert times.seconds_of(_row("dense", [0.1, 0.2]), 10) == [30.0, 60.0]
    search = _times("early-bird", {"search": 3.0, "ticket": 1.0}, check=0.5)
    assert search.seconds_of(_row("early-bird", [0.1, 0.2]), 10) == [30.5, 61.0]


def test_the_target_is_that_of_plain_ddp_with_the_same_seed() -> None:
    rows = [
        _row("dense", [0.90, 0.92]),
        _row("dense", [0.80, 0.82], seed=2),
        _row("worm", [0.914, 0.915], elbow_epoch=0.0, ticket_epoch=0.5),
        _row("worm", [0.815, 0.812], seed=2, elbow_epoch=0.0, ticket_epoch=0.5),
    ]
    results = Results(rows, [_times("dense", {"dense": 4.0}), WORM])
    assert [results.epoch_of(row, 0.5) for row in rows] == [2, 2, 2, 1]
    assert [results.epoch_of(row, 2.0) for row in rows] == [1, 1, 1, 1]
    seconds = [results.seconds_of(row, "100mbit") for row in rows]
    assert seconds[0] == [4.0 * STEPS, 8.0 * STEPS]
    assert seconds[2] == [1.5 * STEPS + 8.0, 2.5 * STEPS + 8.0]
    ratios = [(2.5 * STEPS + 8) / (8 * STEPS), (1.5 * STEPS + 8) / (8 * STEPS)]
    mean = sum(ratios) / 2
    spread = abs(ratios[0] - ratios[1]) / 2**0.5
    (line,) = [
        line
        for line in tables(results).partition("### Seconds")[2].splitlines()
        if line.startswith("| worm")
    ]
    assert f"| {mean:.3f} ± {spread:.3f} |" in line


def test_a_target_that_is_not_reached_has_no_figure() -> None:
    rows = [_row("dense", [0.90, 0.92]), _row("worm", [0.5, 0.6], ticket_epoch=1.0)]
    text = tables(Results(rows, [_times("dense", {"dense": 4.0}), WORM]))
    costs, seconds = [line for line in text.splitlines() if line.startswith("| worm")]
    assert costs.count("0 of 1 | – | – | –") == 3
    assert seconds.endswith(" – | – | – | – | – | – | – | – | – |")


def test_every_method_has_a_label_and_its_counterpart() -> None:
    all_specs = list(specs(SUBJECT, [0.5, 0.3], [1, 2], 3, 2))
    assert {spec.rule.name for spec in all_specs} == set(LABELS)
    keys = [spec.key for spec in all_specs]
    assert len(set(keys)) == len(keys) == 2 * (3 + 2 * 5)
    for spec in all_specs:
        assert spec.parent is None or keys.index(spec.parent) < keys.index(spec.key)
        assert counterpart(spec.key) is None or counterpart(spec.key) in LABELS


def _sent_by_hooks() -> dict[str, list[int]]:
    sent: dict[str, list[int]] = {}
    for name, register in HOOKS.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3)))
        counted, sent[name] = register(model), []
        for _ in range(4):
            before = counted.total
            model(torch.randn(5, 40)).sum().backward()
            sent[name].append(counted.total - before)
    return sent


def test_the_bytes_of_hooks_are_counted_to_the_element(ranks: Ranks) -> None:
    numel = 40 * 30 + 30 + 30 * 3 + 3
    low_rank = POWER_SGD_RANK * (40 + 30)
    assert 2 * low_rank < 40 * 30  # compressed; the other weight is too small for that
    for sent in ranks(2, _sent_by_hooks):
        assert sent["bf16"] == [2 * numel] * 4
        compressed = 4 * (low_rank + 30 + 30 * 3 + 3)
        assert sent["PowerSGD"] == [4 * numel] * 2 + [compressed] * 2


def test_equal_rows_give_equal_pages(tmp_path: Path) -> None:
    rows = [_row("dense", [0.90, 0.92]), _row("worm", [0.9, 0.919], ticket_epoch=1.0)]
    for times in (_times("dense", {"dense": 4.0}), WORM):
        append(tmp_path / STEP_TIMES, times)
    pages = []
    for _ in range(2):
        write(tmp_path, rows, "python -m worm_dist bench run")
        pages.append((tmp_path / PAGE).read_bytes())
    assert pages[0] == pages[1] and b"### Seconds, 100 Mbit/s" in pages[0]


def test_step_times_are_read_back_the_newest_of_each_network(tmp_path: Path) -> None:
    path = tmp_path / STEP_TIMES
    newer = _times("worm", {"search": 9.0, "truncate": 2.0, "ticket": 1.0})
    for times in (WORM, _times("dense", {"dense": 4.0}), newer):
        append(path, times)
    worm, dense = read_step_times(path)
    assert (worm.steps["search"], dense.rule) == (9.0, "dense")
    path.write_text('{"rule": "worm"}\n')
    with pytest.raises(CheckpointError, match=r"steps\.jsonl was not written by this version"):
        read_step_times(path)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--subject", "none"], "there is no subject 'none'; there are vgg, fashion 50k;"),
        (["--rule", "none"], "there is no rule 'none'; there are dense; "),
        (["--epochs", "0"], "--epochs 0; give 1 to 10000"),
        (["--ratio", "1.5"], "--ratio 1.5; give 0.01 to 0.99"),
        (["--ranks", "0"], "--ranks 0; give 1 to 64"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_told(
    name: str, options: list[str], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", name, "--quick", *options]) == 2
    assert complaint in capfd.readouterr().err


def _run(folder: Path) -> int:
    rules = ("--rule", "dense, PowerSGD hook", "--rule", "dense", "--rule", "worm")
    options = ("--quick", "--epochs", f"{EPOCHS}", *rules, "--out", str(folder))
    return main(["bench", "run", *options])


@pytest.mark.slow("trains on the digits, on two ranks")
def test_the_quick_form_trains_measures_and_resumes(ranks: Ranks, tmp_path: Path) -> None:
    # A run that was killed: its last row is cut short, and trained again.
    cut = b'{"key": {"subject": "vgg, dig'
    (tmp_path / "ledger.jsonl").write_bytes(cut)
    (outcome,) = ranks.outcomes(NO_GROUP, _run, tmp_path)
    assert outcome.value == 0, str(outcome)
    rows = (tmp_path / "ledger.jsonl").read_bytes()
    assert rows.startswith(cut + b"\n")
    by_rule = {row["key"]["rule"]: row for row in map(json.loads, rows.splitlines()[1:])}
    assert set(by_rule) == {"dense", "dense, PowerSGD hook", "worm"}
    assert by_rule["dense"]["sent"] == list(range(1, 1 + EPOCHS))
    assert by_rule["dense, PowerSGD hook"]["sent"][-1] < 1
    assert len(by_rule["worm"]["training_seconds"]) == EPOCHS
    worm = by_rule["worm"]
    assert worm["elbow_epoch"] and worm["ticket_epoch"] > worm["elbow_epoch"]
    steps = {each.rule: each.steps for each in read_step_times(tmp_path / STEP_TIMES)}
    assert list(steps["worm"]) == ["search", "truncate", "ticket"]
    assert list(steps["dense"]) == ["dense"]
    page, times = (tmp_path / PAGE).read_bytes(), (tmp_path / STEP_TIMES).read_bytes()
    assert b"### Seconds, lo" in page

    # Again: nothing is trained or measured, and the page is the same.
    (outcome,) = ranks.outcomes(NO_GROUP, _run, tmp_path)
    assert outcome.value == 0, str(outcome)
    assert (tmp_path / "ledger.jsonl").read_bytes() == rows
    assert (tmp_path / STEP_TIMES).read_bytes() == times
    assert (tmp_path / PAGE).read_bytes() == page
    assert len(SUBJECTS[SUBJECT].samples().images) // 64 == STEPS
