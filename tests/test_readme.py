"""What the README says is run: its code, its commands, its defaults."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

import worm_dist
from tests.oracles import mask_dropping
from tests.programs import call, variables_of_ranks
from worm_dist.__main__ import _parse
from worm_dist.config import PRESETS
from worm_dist.models import build_model
from worm_dist.training.config_file import read_run_config
from worm_dist.training.run_config import RunConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.slow("trains a whole run")
@pytest.mark.timeout(110)
def test_the_loop_runs_and_leaves_a_small_network(tmp_path: Path) -> None:
    loop = next(block for block in _blocks("python") if "engine.draw()" in block)
    (tmp_path / "train.py").write_text(loop)
    first, second = call(["train.py"], tmp_path, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (0, 0), first.err + second.err
    assert "epoch 10 ticket" in first.out
    left = re.search(r"([\d,]+) parameters are left", first.out)
    assert left is not None and int(left[1].replace(",", "")) < 0.45 * 94_000
    assert (tmp_path / "ticket" / "ticket.safetensors").exists()


def test_three_lines_load_a_ticket(tmp_path: Path) -> None:
    model: dict[str, Any] = {"name": "vgg_small", "num_classes": 10, "in_channels": 1}
    network = build_model(**model)
    optimizer = SGD(network.parameters(), lr=0.1)
    engine = worm_dist.attach(network, optimizer, example_inputs=torch.zeros(1, 1, 8, 8))
    engine.draw(mask_dropping(engine.groups, 0, 1, 2))
    engine.save_ticket(tmp_path / "runs" / "digits" / "ticket", model)
    lines = next(
        block for block in _blocks("python") if "load_ticket" in block and "def" not in block
    )
    (tmp_path / "load.py").write_text(lines)
    (ended,) = call(["load.py"], tmp_path)
    assert ended.exitcode == 0, ended.err


def test_every_command_is_one_that_exists() -> None:
    for line in "".join(_blocks("sh")).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[0].startswith("launch/"):
            assert os.access(ROOT / words[0], os.X_OK), line
        if "worm_dist" in words:
            options, replaced = _parse(words[words.index("worm_dist") + 1 :])
            if getattr(options, "config", None) is not None:  # of a training
                read_run_config(ROOT / options.config, replaced)


def _defaults() -> dict[str, str]:
    """What the tables of settings say, by key."""
    shown: dict[str, str] = {}
    for keys, defaults in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", TEXT, flags=re.MULTILINE):
        names = re.findall(r"`([^`]+)`", keys)
        if set(names) <= RunConfig().flat().keys():
            shown |= dict(zip(names, defaults.replace("`", "").split(", "), strict=True))
    return shown


def test_every_setting_is_shown() -> None:
    """Timeouts and the comparison of weights were among the errors, but in no table."""
    assert sorted(RunConfig().flat().keys() - _defaults().keys()) == []


def test_every_setting_is_shown_with_its_default(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    for key, text in _defaults().items():
        assert read_run_config(tmp_path / "empty.yaml", [(key, text)]) == RunConfig(), key


def test_every_preset_is_explained() -> None:
    for preset in PRESETS:
        assert f"| `{preset}` |" in TEXT


def test_the_pictures_are_there() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / picture).is_file()
