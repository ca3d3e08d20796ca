"""Replays: of real runs, of journals without a run, and what they are asked for in vain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worm_dist.__main__ import main
from worm_dist.search.convergence import CheckRecord
from worm_dist.training.reporting.journal_lines import CheckLine, read_checks

pytestmark = pytest.mark.slow("trains three small runs")


def _journal(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "check"]


def _replayed(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> Any:
    code = main(["replay", str(run), *words, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize("preset", ["worm", "worm-paper"])
def test_the_runs_own_settings_reproduce_its_verdicts(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    lines, replayed = _journal(runs[preset]), _replayed(capsys, runs[preset])
    assert len(lines) >= 3 and len(replayed["checks"]) == replayed["num_checks"] == len(lines)
    for line, check in zip(lines, replayed["checks"]):
        assert (check["step"], check["distances"]) == (line["step"], line["distances"])
        again = check["replayed"]
        assert (again["threshold"], again["settled"]) == (line["threshold"], line["settled"])
    (elbow,) = [line["step"] for line in lines if line["elbow"]]
    assert replayed["elbow"] == {"run": elbow, "replayed": elbow}
    assert replayed["settled"]["run"] == replayed["settled"]["replayed"]


def test_masks_and_distances_replay_alike(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A shorter window has some of the journal's distances; a longer one needs the masks."""
    run = runs["worm-paper"]
    lines = _journal(run)
    short = _replayed(capsys, run, "--window", "2")
    assert [check["distances"] for check in short["checks"]] == [
        line["distances"][-1:] for line in lines
    ]
    long = _replayed(capsys, run, "--window", "6")
    assert [check["distances"][-4:] for check in long["checks"]] == [
        line["distances"] for line in lines
    ]
    lengths = [len(check["distances"]) for check in long["checks"]]
    assert lengths == [min(number, 5) for number in range(len(lines))] and lengths[-1] == 5


def test_another_rule_decides_by_its_own_threshold(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["worm-paper"]
    words = ["--rule", "relative", "--fraction", "0.9", "--min-masks", "2"]
    replayed = _replayed(capsys, run, *words)
    means = [line["distance_mean"] for line in _journal(run)]
    largest = 0.0
    for mean, check in zip(means[1:], replayed["checks"][1:]):
        largest = max(largest, mean)
        assert check["replayed"]["threshold"] == 0.9 * largest
        assert check["replayed"]["elbow"] == (mean < 0.9 * largest or check["replayed"]["settled"])
    never = _replayed(capsys, runs["worm"], "--margin", "0", "--settled", "0.001")
    assert never["elbow"]["run"] is not None and never["elbow"]["replayed"] is None
    assert any("later one is not known" in remark for remark in never["remarks"])


def test_a_journal_alone_is_replayed_with_defaults(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    journal = Path(shutil.copy(runs["worm-paper"] / "journal.jsonl", tmp_path / "copy.jsonl"))
    with journal.open("a") as file:
        file.write('{"event": "check", "ste')  # the run is about to write it
    replayed = _replayed(capsys, journal)
    assert replayed["replayed"]["settled"] == 0.1
    assert replayed["remarks"][0].startswith("the run has no run.json")
    assert main(["replay", str(journal), "--window", "9"]) == 2
    assert "needs the masks of the checks, and the run has no checkpoint" in capsys.readouterr().err


def test_the_table_has_both_verdicts(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(runs["worm-paper"]), "--rule", "kneedle"]) == 0
    printed = capsys.readouterr().out
    lines = _journal(runs["worm-paper"])
    rows = [line.split() for line in printed.splitlines() if line[:5].strip().isdecimal()]
    assert [row[2] for row in rows] == [f"{line['step']:,}" for line in lines]
    assert [row[3] for row in rows[1:]] == [f"{line['distance_mean']:.4f}" for line in lines[1:]]
    (elbow,) = [number for number, line in enumerate(lines) if line["elbow"]]
    assert "elbow" in rows[elbow][6]
    assert "Replayed: rule kneedle from 5 masks on" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["{tmp}/nothing"], 2, "there is no"),
        (["{dense}"], 2, "has no check; the run has not searched"),
        (["{worm}", "--fraction", "0.3"], 2, "--fraction: has no effect on the rule margin"),
        (["{worm}", "--settled", "7"], 2, "search.settled"),
        (["{worm}/result.json"], 3, "line 1: not an event of a run"),
    ],
)
def test_a_mistake_is_one_line(
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    code: int,
    says: str,
) -> None:
    given = [word.format(tmp=tmp_path, **runs) for word in words]
    assert main(["replay", *given]) == code
    printed = capsys.readouterr()
    assert says in printed.err and "Traceback" not in printed.err and printed.out == ""


def test_what_is_read_of_a_check_is_what_the_record_has() -> None:
    """So plots take either."""
    attributes = {*CheckRecord.__dataclass_fields__, "distance_mean", "distance_max"}
    assert CheckLine.model_fields.keys() - {"epoch", "rule"} <= attributes


def test_a_journal_is_read_like_the_run_wrote_it(runs: dict[str, Path]) -> None:
    for preset in ("worm", "worm-paper"):
        for line, check in zip(
            _journal(runs[preset]), read_checks(runs[preset] / "journal.jsonl"), strict=True
        ):
            assert {key: line[key] for key in CheckLine.model_fields} == {
                **check.model_dump(),
                "distances": list(check.distances),
            }
