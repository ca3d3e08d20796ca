"""Every file in configs/ is a valid run, and its header says what a reader wants to know."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import yaml

from worm_dist.models import build_model
from worm_dist.presets import PRESETS
from worm_dist.training.run_config import RunConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
IN_CHANNELS = {"digits": 1, "fashion-mnist": 1}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def _run(path: Path) -> RunConfig:
    return RunConfig(**yaml.safe_load(path.read_text()))


def test_there_are_configs() -> None:
    assert CONFIGS


@each_config
def test_config_is_valid(path: Path) -> None:
    _run(path)


@each_config
@pytest.mark.parametrize("preset", PRESETS)
def test_control_experiments_take_the_same_file(path: Path, preset: str) -> None:
    RunConfig(**{**yaml.safe_load(path.read_text()), "preset": preset})


@each_config
def test_model_can_be_built(path: Path) -> None:
    run = _run(path)
    with torch.device("meta"):
        build_model(run.model.name, 10, IN_CHANNELS.get(run.data.name, 3), run.model.arguments)


@each_config
def test_header_says_command_cost_and_expected_result(path: Path) -> None:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    header = "\n".join(lines).lower()
    assert f"worm_dist train {path.relative_to(ROOT)}" in header
    assert "cost" in header
    assert "expected" in header


def test_run_names_differ() -> None:
    names = [_run(path).name for path in CONFIGS]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("name", ["resnet18_cifar10", "vgg11_bn_cifar10"])
def test_paper_configs_have_the_papers_settings(name: str) -> None:
    run = _run(ROOT / "configs" / "paper" / f"{name}.yaml")
    search, truncation, optimizer = run.search, run.truncation, run.optimizer
    assert run.preset == "worm-paper"
    assert (search.prune_ratio, search.settled, search.window, search.l1) == (0.5, 0.1, 5, 0)
    assert (search.elbow.rule, search.elbow.margin) == ("margin", 0.05)
    assert (truncation.mode, truncation.ratio) == ("soft", 0.003)
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.01, 0.9)
    assert optimizer.weight_decay == 0
    assert (run.schedule.name, run.data.batch_size, run.data.augment) == ("constant", 32, False)
