"""Published results: every page is what its command makes of the rows beside it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

import worm_dist
from worm_dist.__main__ import main
from worm_dist.bench.ledger.row import Row, read_rows
from worm_dist.bench.scaling.page import write as write_scale
from worm_dist.bench.scaling.row import read_scale_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/ledger.md"))


def test_there_are_results() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_page_is_written_by_its_command(folder: Path, tmp_path: Path) -> None:
    page = (folder / "ledger.md").read_text()
    (command,) = re.findall(r"```sh\n(python .*)\n```", page)
    words = shlex.split(command)
    place = words.index("--out") + 1
    assert ROOT / words[place] == folder
    words[place] = str(tmp_path / folder.name)
    shutil.copytree(folder, words[place])
    assert main(words[3:]) == 0
    written = (tmp_path / folder.name / "ledger.md").read_text()
    assert written.replace(words[place], str(folder.relative_to(ROOT))) == page
    # So no row was trained for it.
    rows = folder / "ledger.jsonl"
    assert (tmp_path / folder.name / rows.name).read_bytes() == rows.read_bytes()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_row_is_in_order(folder: Path) -> None:
    for row in read_rows(folder / "ledger.jsonl"):
        assert len(row.accuracies) == row.key.epochs or row.error, row.key
        assert row.error or row.test_accuracy is not None, row.key


def test_the_page_of_time_to_accuracy_is_written_by_its_command(tmp_path: Path) -> None:
    folder = RESULTS / "time-to-accuracy"
    page = (folder / "time-to-accuracy.md").read_text()
    (command,) = re.findall(r"```sh\n(python .*)\n```", page)
    words = shlex.split(command)
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    words[words.index("--out") + 1] = str(copy)
    assert main(words[3:]) == 0
    written = (copy / "time-to-accuracy.md").read_text()
    assert written.replace(str(copy), str(folder.relative_to(ROOT))) == page
    assert (copy / "ledger.jsonl").read_bytes() == (folder / "ledger.jsonl").read_bytes()


def test_the_page_of_scale_is_written_from_its_rows(tmp_path: Path) -> None:
    folder = RESULTS / "scale"
    text = write_scale(tmp_path, read_scale_rows(folder / "scale.jsonl"))
    assert text == (folder / "scale.md").read_text()


_RULE = "worm, trigger 3 %, duration 40 %, layer threshold, flops=0.25"
_SHOWN = {
    "dense": "dense",
    _RULE: "`worm`",
    f"{_RULE}: uniform at equal FLOPs": "uniform",
    f"{_RULE}: ticket from scratch": "ticket from scratch",
    f"{_RULE}: random channels": "random channels",
}


_IN_README = {
    "dense": "dense",
    _RULE: "`worm`",
    f"{_RULE}: uniform at equal FLOPs": "uniformly thinner, from scratch",
    f"{_RULE}: ticket from scratch": "the ticket's widths, from scratch",
    f"{_RULE}: random channels": "random channels leave",
}


def test_the_readme_has_the_first_results() -> None:
    rows = read_rows(RESULTS / "fashion-50k" / "ledger.jsonl")
    readme = (ROOT / "README.md").read_text()
    for rule, shown in _IN_README.items():
        both = [
            [row for row in rows if (row.key.subject, row.key.rule) == (subject, rule)]
            for subject in ("vgg, fashion 50k", "resnet, fashion 50k")
        ]
        cells = [shown, *(_spread([_test(row) for row in here], 4) for here in both)]
        for figure in ("flops", "run_flops", "run_bytes"):
            vgg, resnet = (f"{mean(getattr(row, figure) for row in here):.3f}" for here in both)
            cells.append(vgg if vgg == resnet else f"{vgg} / {resnet}")
        assert f"| {' | '.join(cells)} |" in readme


def test_the_page_of_accuracies_has_the_first_results() -> None:
    rows = read_rows(RESULTS / "fashion-50k" / "ledger.jsonl")
    page = (ROOT / "docs" / "accuracy.md").read_text()
    for subject, name in (("vgg, fashion 50k", "VGG"), ("resnet, fashion 50k", "ResNet")):
        by_rule = {
            rule: [row for row in rows if (row.key.subject, row.key.rule) == (subject, rule)]
            for rule in _SHOWN
        }
        for rule, here in by_rule.items():
            cells = [
                name,
                _SHOWN[rule],
                _spread([row.final for row in here], 4),
                _spread([_test(row) for row in here], 4),
                _difference(here, by_rule["dense"]),
                _difference(here, by_rule[f"{_RULE}: uniform at equal FLOPs"]),
                *(
                    f"{mean(getattr(row, figure) for row in here):.3f}"
                    for figure in ("flops", "parameters", "run_flops", "run_bytes")
                ),
            ]
            assert f"| {' | '.join(cells)} |" in page


def _difference(rows: list[Row], others: list[Row]) -> str:
    """Of the accuracies on the test split, in points, of pairs with the same seed."""
    if rows == others:
        return "–"
    by_seed = {row.key.seed: _test(row) for row in others}
    points = [100 * (_test(row) - by_seed[row.key.seed]) for row in rows]
    return f"{mean(points):+.2f} ± {stdev(points):.2f}"


def _test(row: Row) -> float:
    assert row.test_accuracy is not None
    return row.test_accuracy


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


TICKETS = sorted(path.parent for path in RESULTS.glob("tickets/*/ticket.json"))


def test_tickets_are_small() -> None:
    assert [folder.name for folder in TICKETS] == ["digits", "fashion-mnist"]
    files = [file for folder in TICKETS for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 1_000_000


@pytest.mark.parametrize("folder", TICKETS, ids=lambda folder: folder.name)
def test_a_ticket_is_what_its_page_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ticket", "verify", str(folder)]) == 0
    capsys.readouterr()
    network = worm_dist.load_ticket(folder).eval()
    side = 8 if folder.name == "digits" else 28
    assert network(torch.zeros(2, 1, side, side)).shape == (2, 10)
    num_parameters = f"{sum(p.numel() for p in network.parameters()):,}".replace(",", " ")
    (row,) = re.findall(
        rf"^.*\({folder.name}/ticket.json\).*$", (RESULTS / "tickets/README.md").read_text(), re.M
    )
    assert f"| {num_parameters} of " in row
