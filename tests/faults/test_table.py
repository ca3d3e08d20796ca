from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tests.faults.table import FAULTS, Table


def _report(number: int, tried: str) -> SimpleNamespace:
    return SimpleNamespace(user_properties=[("fault", (number, tried)), ("cell", ("a", "b"))])


def test_every_fault_has_a_row_and_every_trial_its_outcome(tmp_path: Path) -> None:
    killed = _report(3, "killed")
    table = Table({"passed": [killed, killed], "failed": [killed], "xfailed": [_report(3, "hung")]})
    table.write(tmp_path / "report" / "faults.md")
    head, _, *rows = (tmp_path / "report" / "faults.md").read_text().splitlines()
    assert head.startswith("|  | fault | what must happen |")
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 51))
    assert rows[2].endswith("| killed: ok 2, F 1<br>hung: x 1 |")
    assert rows[24].endswith("| not tried |")
    assert "killed" in table.text() and FAULTS[25].what not in table.text()


def test_it_is_whole_when_every_fault_was_tried() -> None:
    reports = [_report(number, "once") for number in FAULTS]
    assert Table({"passed": reports}).is_whole
    assert not Table({"passed": reports[:2] + reports[3:]}).is_whole
    assert not Table({})
