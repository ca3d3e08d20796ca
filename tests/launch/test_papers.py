"""The tables of the papers: what ``launch/papers`` runs, and what it prints."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, call, environment_with, needs_venv

_TINY = ("--epochs", "2", "--retraining.epochs", "1", "--search.window", "2")


@needs_venv
@pytest.mark.slow("two short trainings, ten seconds")
def test_a_paper_and_its_control_are_trained_and_printed(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "launch" / "papers", "worm", "3", *_TINY, "--search.settled", "0.9"],
        cwd=tmp_path,
        env=environment_with(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["early-bird, seed 3", "worm-paper, seed 3"]
    header, *rows = _cells("\n".join(lines[2:]))
    assert header[:3] == ["preset (1 seeds)", "masks", "epochs of search"]
    assert [row[0] for row in rows] == ["`early-bird`", "`worm-paper`"]
    for row in rows:
        # The second mask, after an epoch, is the ticket.
        assert row[1:3] == ["2.000", "1.000"]
        assert row[header.index("after one epoch")] == row[header.index("at the end")]
    found = {path.parent.name for path in tmp_path.glob("runs/papers/worm/*/result.json")}
    assert found == {"early-bird-3", "worm-paper-3"}


def _cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, its header first."""
    lines = table.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


def test_the_table_has_mean_and_deviation_of_what_the_runs_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, epochs in ((0, 3), (1, 6), (2, None)):
        result = {
            "preset": "early-bird",
            "seed": seed,
            "checks": 7,
            "ticket_epoch": 6.0,
            "accuracy": {
                "before_draw": 0.9 + seed / 100,
                "after_draw": None,
                "after_one_epoch": None,
                "final": 0.8,
            },
            "recovery": {"accuracy": 0.9, "epochs": epochs},
            "seconds": {"total": 1.0},
        }
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "result.json").write_text(json.dumps(result))
    script = runpy.run_path(str(ROOT / "launch" / "compare_table.py"))
    script["main"](tmp_path, script["PAPERS"])
    header, row = _cells(capsys.readouterr().out)
    found = dict(zip(header, row))
    assert found["accuracy before the draw"] == "0.910 ± 0.010"
    assert found["after it"] == "–"
    assert found["epochs to recover"] == "4.500 ± 2.121, 1 without"


@needs_venv
def test_an_unknown_paper_is_refused() -> None:
    done = call("papers", "worms")
    assert done.returncode == 2
    assert done.stderr.endswith("launch/papers: worms is none of worm, early-bird, earlybert\n")
