from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ticket_command.tickets import change, change_weights, copied
from worm_dist.__main__ import main


def test_intact_tickets_are_one_line_and_exit_code_0(
    ticket: Path, own_ticket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ticket", "verify", str(ticket)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "intact" in line and "10 of 20 channels in 2 groups" in line
    assert line.endswith("loaded as vgg_small with 414 parameters")
    assert main(["ticket", "verify", str(own_ticket)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "intact" in line and "not loaded" in line


def test_json_says_whether_it_is_intact(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ticket", "verify", str(ticket), "--json"]) == 0
    intact = json.loads(capsys.readouterr().out)
    assert (intact["intact"], intact["kept"], intact["channels"]) == (True, 10, 20)
    assert (intact["model"], intact["parameters"], intact["reason"]) == ("vgg_small", 414, None)
    damaged = copied(ticket, tmp_path / "ticket")
    _flip_a_bit(damaged)
    assert main(["ticket", "verify", str(damaged), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["intact"] is False and "wanted sha256" in found["reason"]


def _flip_a_bit(ticket: Path) -> None:
    weights = bytearray((ticket / "ticket.safetensors").read_bytes())
    weights[-5] ^= 1
    (ticket / "ticket.safetensors").write_bytes(weights)


def _other_model(content: dict[str, Any]) -> None:
    content["model"]["arguments"]["widths"] = [8, 13]


def _keep_one_more(content: dict[str, Any]) -> None:
    consumer = next(cut for cut in content["cuts"] if cut["dim"] == 1)
    consumer["kept"].append(consumer["size"] - 1)


@pytest.mark.parametrize("fixture", ["ticket", "own_ticket"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_bit, "ticket.safetensors: wanted sha256"),
        (lambda ticket: change(ticket, _keep_one_more), "but the weights have"),
        (lambda ticket: change(ticket, lambda content: content["cuts"].clear()), "loses 0 rows"),
    ],
)
def test_damage_is_one_line_and_exit_code_3(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fixture: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = copied(request.getfixturevalue(fixture), tmp_path / "ticket")
    damage(folder)
    assert main(["ticket", "verify", str(folder)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_weights_that_do_not_fit_the_named_model_are_refused(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_model = copied(ticket, tmp_path / "model")
    change(other_model, _other_model)
    assert main(["ticket", "verify", str(other_model)]) == 3
    assert "does not fit the network" in capsys.readouterr().err
    without_head = copied(ticket, tmp_path / "tensors")
    change_weights(without_head, lambda tensors: tensors.pop("head.bias"))
    assert main(["ticket", "verify", str(without_head)]) == 3
    assert "'head.bias' is not there" in capsys.readouterr().err
