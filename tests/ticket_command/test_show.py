from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ticket_command.tickets import NAMED, change, copied
from worm_dist import WormConfig, load_ticket
from worm_dist.__main__ import main
from worm_dist.groups.flops import count_flops
from worm_dist.models import build_model


def _json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert main(["ticket", "show", *map(str, words), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_figures_are_those_of_the_networks(
    ticket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _json(capsys, ticket)
    dense, small = build_model(**NAMED), load_ticket(ticket)
    sample = torch.zeros(1, *shown["input_shape"])
    assert shown["parameters"] == {
        "dense": _num_parameters(dense),
        "ticket": _num_parameters(small),
    }
    assert shown["flops"] == {
        "dense": count_flops(dense, sample),
        "ticket": count_flops(small, sample),
    }
    assert shown["model"] == NAMED and shown["input_shape"] == [3, 8, 8]
    kept = {group["name"]: group["kept"] for group in shown["groups"]}
    assert kept == {"features.0": list(range(4)), "features.3": list(range(6))}
    config = WormConfig(truncation={"mode": "off"}, search={"prune_ratio": 0.4})
    assert shown["settings"] == config.model_dump(mode="json")
    assert shown["speed"] is None and shown["run"] is None


def test_bars_and_shares_are_printed(ticket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ticket", "show", str(ticket)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "vgg_small, 10 classes" in printed and "Keeps 10 of 20 channels" in printed
    assert f"features.3  {'━' * 16}{' ' * 18}6/12  50.0 %" in printed
    assert 'Settings: search.prune_ratio 0.4, truncation.mode "off", ' in printed


def test_the_run_is_that_of_the_folder_if_it_drew_the_same_mask(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(ticket, tmp_path / "ticket")
    digest = json.loads((folder / "ticket.json").read_text())["mask_digest"]
    result = {"preset": "worm", "seed": 3, "accuracy": {"final": 0.875}, "mask_digest": digest}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert main(["ticket", "show", str(folder)]) == 0
    assert "Run: preset worm, seed 3, accuracy 0.875." in capsys.readouterr().out
    (tmp_path / "result.json").write_text(json.dumps({**result, "mask_digest": "0" * 32}))
    assert _json(capsys, folder)["run"] is None


def test_a_network_of_ones_own_is_shown_without_figures(
    own_ticket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _json(capsys, own_ticket)
    assert shown["parameters"] is None and shown["flops"] is None
    assert "load_ticket(path, build=...)" in shown["unknown"]
    assert main(["ticket", "show", str(own_ticket), "--speed"]) == 2
    assert "--speed: parameters and FLOPs are not known" in capsys.readouterr().err


def test_tickets_of_the_format_before_are_read(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have neither the input's shape nor settings."""
    old = copied(ticket, tmp_path / "ticket")

    def to_format_4(content: dict[str, Any]) -> None:
        del content["input_shape"], content["settings"]
        content["format_version"] = 4

    change(old, to_format_4)
    shown = _json(capsys, old)
    assert shown["parameters"]["ticket"] == _num_parameters(load_ticket(old))
    assert shown["flops"] is None and "give --input" in shown["unknown"]
    assert _json(capsys, old, "--input", "3x8x8")["flops"] == _json(capsys, ticket)["flops"]
    content = json.loads((old / "ticket.json").read_text())
    (old / "ticket.json").write_text(json.dumps({**content, "settings": {}}))
    assert main(["ticket", "show", str(old)]) == 3
    assert "format 4 has no settings" in capsys.readouterr().err


def test_speed_is_measured_if_asked_for(ticket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed = _json(capsys, ticket, "--speed", "--batch", "2")["speed"]
    assert speed["dense"] > 0 and speed["ticket"] > 0
    assert speed["num_samples"] == 2 and 3 <= speed["rounds"] <= 9
    assert main(["ticket", "show", str(ticket), "--speed", "--batch", "2"]) == 0
    assert "forward passes in eval mode, without gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["show", "nowhere"], 3, "is this the folder of a ticket?"),
        (["show", "TICKET", "--batch", "8"], 2, "--batch: only for the measurement"),
        (["show", "TICKET", "--speed", "--batch", "0"], 2, "--batch: 0 is too small"),
        (["show", "TICKET", "--input", "8x8"], 2, "--input: '8x8' is not an image shape"),
        (["show", "TICKET", "--input", "1x8x8"], 2, "the network does not run on 1x8x8"),
        (["diff", "TICKET", "nowhere"], 3, "is this the folder of a ticket?"),
        (["export", "TICKET", "--torch-export", "/nowhere/x.pt2"], 3, "/nowhere/x.pt2: cannot be"),
        (["export", "TICKET", "--torch-export", "/tmp"], 2, "/tmp: is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_its_exit_code(
    ticket: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    exit_code: int,
    message: str,
) -> None:
    given = [str(ticket) if word == "TICKET" else word for word in words]
    assert main(["ticket", *given]) == exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("words", [["show", "x", "--sped"], ["export", "x"], []])
def test_words_that_it_does_not_know_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["ticket", *words])
