"""Settings that are valid and can never act are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.driver import CONFIG, Driver, Run
from worm_dist.__main__ import main
from worm_dist.training.config_file import read_run_config
from worm_dist.training.ineffective_settings import ineffective_settings

_CONFIGS = sorted(CONFIG.parent.rglob("*.yaml"))
_16_EPOCHS: dict[str, tuple[list[str], list[str]]] = {
    "no check": (
        ["search.every=50ep"],
        ["search.every: 50ep is longer than the run of 16 epochs; there is no check, and no"],
    ),
    "window": (
        ["search.window=20"],
        ["search.window: 20 masks are never reached, as the run of 16 epochs has 16 checks; it is"],
    ),
    "window that decides": (
        ["search.window=20", "truncation.frozen_weights=hold"],
        ["search.window: 20 masks are never reached, as the run of 16 epochs has 16 checks; no ti"],
    ),
    "elbow": (
        ["search.every=6ep", "search.window=2", "search.elbow.latest=null"],
        ["search.elbow.min_masks: 3 masks are never reached, as the run of 16 epochs has 2 checks"],
    ),
    "removal": (
        ["search.every=5ep", "search.window=3", "truncation.removal.duration=12ep"],
        ["truncation.removal.duration: 12ep after the earliest start, at epoch 5, is behind the"],
    ),
    "rule that comes too late": (
        ["search.elbow.margin=0.2", "search.elbow.min_masks=4"],
        [
            "search.elbow.margin: has no effect: truncation starts at epoch 2 at the latest",
            "search.elbow.min_masks: has no effect: truncation starts at epoch 2 at the latest",
        ],
    ),
    "patience": (["truncation.removal.patience=17ep"], ["truncation.removal.patience: 17ep is"]),
    "warm-up": (["schedule.warmup_epochs=16"], ["schedule.warmup_epochs: 16 of 16 epochs; the"]),
    "milestones": (
        ["schedule.name=step", "schedule.milestones=[8, 16, 20]"],
        ["schedule.milestones: [16, 20] are not before the end of 16 epochs"],
    ),
    "checkpoints": (["checkpoint.every=17ep"], ["checkpoint.every: 17ep is longer"]),
    "comparisons": (["divergence.check_every=17ep"], ["divergence.check_every: 17ep is longer"]),
    "dense": (
        ["preset=dense", "search.prune_ratio=0.3", "ticket.round_to=4"],
        [
            "search.prune_ratio: has no effect: preset 'dense' does not search",
            "ticket.round_to: has no effect: preset 'dense' does not search",
        ],
    ),
    "no search": (
        ["search.enabled=false", "truncation.scope=norm"],
        ["truncation.scope: has no effect: search.enabled is false"],
    ),
    "no elbow": (
        ["preset=early-bird", "search.elbow.min_masks=4"],
        ["search.elbow.min_masks: has no effect: with truncation.mode off there is no elbow"],
    ),
    "another rule": (
        [
            *("search.elbow.rule=kneedle", "search.elbow.margin=0.1", "search.elbow.fraction=0.1"),
            "search.elbow.latest=null",
        ],
        ["search.elbow.margin: has no effect: for", "search.elbow.fraction: has no effect: for"],
    ),
    "hard": (["truncation.ratio=0.1"], ["truncation.ratio: has no effect: for truncation.mode so"]),
    "hold": (
        ["truncation.frozen_weights=hold", "truncation.removal.duration=2ep"],
        ["truncation.removal.duration: has no effect: for mode hard with"],
    ),
    "one shot": (
        ["truncation.removal.schedule=one_shot", "truncation.removal.stage=0.5"],
        ["truncation.removal.stage: has no effect: for schedule gradual only"],
    ),
    "others": (
        [
            *("optimizer.name=adam", "optimizer.momentum=0.5", "schedule.gamma=0.5"),
            *("data.root=data", "data.image_size=64", "ticket.recalibrate_batches=0"),
            *("ticket.recalibrate_memory_mb=8", "distributed.backend=deepspeed"),
            "distributed.bucket_cap_mb=1",
        ],
        [
            "ticket.recalibrate_memory_mb: has no effect",
            "data.root: has no effect",
            "data.image_size: has no effect",
            "optimizer.momentum: has no effect: for sgd only",
            "schedule.gamma: has no effect",
            "distributed.bucket_cap_mb: has no effect",
        ],
    ),
    "nothing": (
        ["search.window=16", "search.every=1ep", "checkpoint.every=16ep", "search.l1=0"],
        [],
    ),
}


@pytest.mark.fault(40, "intervals, choices that were not made, presets")
@pytest.mark.parametrize("case", list(_16_EPOCHS))
def test_each_setting_that_cannot_act_is_one_line(
    capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """They were taken without a word."""
    settings, lines = _16_EPOCHS[case]
    assert main(["train", str(CONFIG), "--check", *(f"--{pair}" for pair in settings)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("digits.yaml: the settings are valid\n")
    told = err.splitlines()
    assert len(told) == len(lines), told
    for line, begins in zip(told, lines, strict=True):
        assert line.startswith(f"worm_dist: warning: {begins}")


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_our_own_files_have_none(path: Path) -> None:
    config = read_run_config(path, [])
    steps_per_epoch = 22 if config.data.name == "digits" else 234
    assert ineffective_settings(config, steps_per_epoch) == ineffective_settings(config) == []


@pytest.mark.fault(40, "intervals in steps, at the start of a run")
def test_a_run_tells_it_once_it_knows_its_steps(driver: Driver) -> None:
    """Sixteen steps."""
    settings = {"search.prune_ratio": 0.3, "checkpoint.every": "17ba", "optimizer.momentum": 0.5}
    ends = driver(2, Run((), settings))
    assert [end.exitcode for end in ends] == [0, 0]
    assert ends[1].said == ""
    assert ends[0].said.splitlines() == [
        "worm_dist: warning: search.prune_ratio: has no effect: preset 'dense' does not search",
        "worm_dist: warning: checkpoint.every: 17ba is longer than the run of 2 epochs; only the "
        "end of the run is saved",
    ]


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)
