from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ticket_command.tickets import NAMED, change_weights, copied, drawn
from worm_dist.__main__ import main
from worm_dist.models import build_model


def _diff(
    capsys: pytest.CaptureFixture[str], first: Path, second: Path, exit_code: int
) -> dict[str, Any]:
    assert main(["ticket", "diff", str(first), str(second), "--json"]) == exit_code
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


def test_a_ticket_equals_itself(ticket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _diff(capsys, ticket, ticket, exit_code=0)
    assert found["equal"] and found["same_dense_network"] and found["distance"] == 0
    assert found["largest_difference"] == 0
    assert main(["ticket", "diff", str(ticket), str(ticket)]) == 0
    assert "Weights that differ" not in capsys.readouterr().out


def test_masks_are_compared_channel_by_channel(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept are 4 of 8 and 6 of 12 in one, 6 of 8 and 9 of 12 in the other."""
    torch.manual_seed(1)  # weights that the other ticket has not
    drawn(build_model(**NAMED), share=0.75).save_ticket(tmp_path, model=NAMED)
    found = _diff(capsys, ticket, tmp_path, exit_code=1)
    assert found["distance"] == 5 / 20 and found["same_dense_network"]
    first, second = found["groups"]
    assert first == {
        "name": "features.0",
        "both": 4,
        "only_first": 0,
        "only_second": 2,
        "neither": 2,
    }
    assert [second[key] for key in ("both", "only_first", "only_second", "neither")] == [6, 0, 3, 3]
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    weight, bias = tensors["features.3.weight"], tensors["head.bias"]  # of another network
    assert (weight["first"], weight["second"]) == ([6, 4, 3, 3], [9, 6, 3, 3])
    assert weight["difference"] is None and bias["difference"] > 0


def _fill(value: float, tensors: dict[str, Tensor]) -> None:
    tensors["head.bias"].fill_(value)


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"].view(-1)[0] += 0.25


def test_weights_of_equal_shape_have_a_largest_difference(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(ticket, tmp_path / "ticket")
    change_weights(other, _add)
    found = _diff(capsys, ticket, other, exit_code=1)
    assert found["distance"] == 0
    assert [t["name"] for t in found["tensors"] if not t["is_equal"]] == ["head.weight"]
    assert found["largest_difference"] == pytest.approx(0.25, abs=1e-6)
    assert main(["ticket", "diff", str(ticket), str(other)]) == 1
    assert "head.weight" in capsys.readouterr().out


def _count(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"].view(-1)[0] += 0.25
    tensors["features.1.num_batches_tracked"] += 22


def test_counters_do_not_hide_the_largest_difference_of_weights(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of other lengths: "largest difference 22", that of a BatchNorm's batches."""
    other = copied(ticket, tmp_path / "ticket")
    change_weights(other, _count)
    found = _diff(capsys, ticket, other, exit_code=1)
    assert [t["name"] for t in found["tensors"] if t["counts"] and not t["is_equal"]] == [
        "features.1.num_batches_tracked"
    ]
    assert found["largest_difference"] == pytest.approx(0.25, abs=1e-6)


def test_equal_is_bit_for_bit(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, zero in (("one", 0.0), ("other", -0.0)):
        change_weights(copied(ticket, tmp_path / name), partial(_fill, zero))
    found = _diff(capsys, tmp_path / "one", tmp_path / "other", exit_code=1)
    assert not found["equal"] and found["largest_difference"] == 0


def test_another_dense_network_is_named(
    ticket: Path, own_ticket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _diff(capsys, ticket, own_ticket, exit_code=1)
    assert found["same_dense_network"] is False and found["distance"] is None
    assert found["groups"] == [] and "features.0" in found["other_groups"]
    assert main(["ticket", "diff", str(ticket), str(own_ticket)]) == 1
    assert "Drawn from different dense networks." in capsys.readouterr().out
    assert _diff(capsys, own_ticket, own_ticket, exit_code=0)["same_dense_network"] is None
