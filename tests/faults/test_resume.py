"""A run that is broken off anywhere and goes on ends as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.faults.courses import ALL_PHASES, differences_of_runs, last_state, under_zero
from tests.faults.driver import CONFIG, SMALL
from tests.faults.training import train
from tests.ranks import Ranks
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.manifest import CheckpointInfo
from worm_dist.errors import CheckpointError, ConfigError
from worm_dist.training.checkpointer import RUN
from worm_dist.training.config_file import read_run_config
from worm_dist.training.resume_config import fixed_settings
from worm_dist.training.run_config import RunConfig
from worm_dist.training.run_folder import CHECKPOINTS, SETTINGS, open_run_folder
from worm_dist.training.trainer import Trainer

pytestmark = pytest.mark.slow("trains runs from many checkpoints to their end")


def _gone_on_with(folder: Path, settings: Mapping[str, Any], steps: list[int]) -> None:
    kept = {"checkpoint.every": "1ba", "checkpoint.keep_last": 100}
    train(folder / "whole", **{**settings, **kept})
    for step in steps:
        path = folder / "whole" / "checkpoints" / f"step-{step}"
        train(folder / f"from-{step}", resume=str(path), **settings)


@pytest.mark.fault(1, "bit-equal from every phase")
@pytest.mark.parametrize(
    ("world_size", "settings", "steps"),
    [
        (2, {}, [3, 4, 6, 8, 10, 13, 23]),
        (3, {"data.batch_size": 18}, [5, 12]),
        (
            2,
            {"optimizer.name": "adamw", "optimizer.lr": 0.01, "truncation.compression": "powersgd"},
            [3, 5, 11],
        ),
        (2, {"data.num_workers": 2, "truncation.frozen_weights": "hold"}, [5]),
        (2, {"model.channels_last": "on", "optimizer.fused": "on"}, [5, 8]),
    ],
    ids=["worm", "three", "powersgd", "loaders", "kernels"],
)
def test_gone_on_with_from_any_step_it_ends_the_same(
    ranks: Ranks, tmp_path: Path, world_size: int, settings: dict[str, Any], steps: list[int]
) -> None:
    call = (_gone_on_with, tmp_path, {**ALL_PHASES, **settings}, steps)
    for outcome in ranks.outcomes(world_size, *call):
        assert outcome.exitcode == 0, str(outcome)
    phases = {
        Checkpoint(path).manifest.phase for path in (tmp_path / "whole" / "checkpoints").iterdir()
    }
    assert {"search", "truncate", "ticket"} >= phases >= {"search", "truncate"}
    for step in steps:
        found = list(differences_of_runs(tmp_path / "whole", tmp_path / f"from-{step}"))
        assert not found, f"from step {step}: " + "\n".join(found[:20])


# ---- DeepSpeed -----------------------------------------------------------------------------------


def _tell_deepspeed() -> None:
    """What a launcher tells it."""
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()))
    os.environ.update(WORLD_SIZE=str(dist.get_world_size()), MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT="1")


STEPS_OF_STAGES = {1: [3, 10, 13], 2: [6, 8]}
"""Searching, at the draw and after it; fading, and once silent columns have left."""


def _under_deepspeed(folder: Path) -> None:
    _tell_deepspeed()
    for stage, steps in STEPS_OF_STAGES.items():
        _gone_on_with(folder / str(stage), under_zero(stage), steps)


@pytest.mark.fault(1, "bit-equal from every phase under ZeRO stages 1 and 2")
def test_under_zero_it_ends_the_same(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    for outcome in ranks.outcomes(2, _under_deepspeed, tmp_path, group_timeout=100):
        assert outcome.exitcode == 0, str(outcome)
    for stage, steps in STEPS_OF_STAGES.items():
        for step in steps:
            folder = tmp_path / str(stage)
            found = list(differences_of_runs(folder / "whole", folder / f"from-{step}"))
            assert not found, f"stage {stage}, from step {step}: " + "\n".join(found[:20])


# ---- another number of ranks ---------------------------------------------------------------------

DENSE = {"preset": "dense", "optimizer.lr": 0.01}


def _samples_of_steps(out: Path, num_steps: int, settings: dict[str, Any]) -> list[list[float]]:
    """Train so many steps on; the samples that this rank has been given, by their sums."""
    _tell_deepspeed()
    given: list[list[float]] = []
    real = Trainer._train_step

    def step(self: Trainer, inputs: Tensor, targets: Tensor) -> Tensor:
        given.append(inputs.flatten(1).sum(dim=1).tolist())
        return real(self, inputs, targets)

    Trainer._train_step = step  # type: ignore[method-assign]
    train(out, heed=lambda halt: halt.stop_at(num_steps), **settings)
    return given


def _global_batches(of_ranks: list[list[list[float]]]) -> list[list[float]]:
    return [sorted(sample for batch in step for sample in batch) for step in zip(*of_ranks)]


def _samples(
    ranks: Ranks, world_size: int, out: Path, num_steps: int, settings: dict[str, Any]
) -> list[list[float]]:
    """Of every step, of all ranks."""
    call = (_samples_of_steps, out, num_steps, settings)
    outcomes = ranks.outcomes(world_size, *call)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return _global_batches([outcome.value for outcome in outcomes])


@pytest.mark.fault(11, "from two ranks to one and back, with the same global batch")
@pytest.mark.parametrize(
    ("settings", "course"),
    [
        (DENSE, ((2, 3), (1, 8), (2, 100))),
        ({**ALL_PHASES, "epochs": 2}, ((2, 3), (1, 8), (2, 100))),
        ({**under_zero(2), "epochs": 2}, ((2, 6), (1, 100))),
    ],
    ids=["dense", "worm", "zero2"],
)
def test_on_another_number_of_ranks_each_step_has_the_same_samples(
    ranks: Ranks, tmp_path: Path, settings: dict[str, Any], course: tuple[tuple[int, int], ...]
) -> None:
    """Parts begin and end in the middle of an epoch, and while channels fade; the last one finds
    and draws the ticket."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    wanted = _samples(ranks, 2, whole, 100, settings)
    found = []
    for world_size, num_steps in course:
        found += _samples(ranks, world_size, out, num_steps, settings)
    assert found == wanted
    for epoch in (found[:8], found[8:]):
        assert len({sample for step in epoch for sample in step}) == 128, "each comes once"
    one, other = last_state(whole), last_state(out)
    phases = [state["engine"]["shared"]["verdict"]["phase"] for state in (one, other)]
    assert phases[0] == phases[1]
    for name, tensor in one["network"].items():
        # BatchNorm sees as many samples as a rank has.
        assert torch.allclose(tensor.float(), other["network"][name].float(), atol=0.1), name


def _train(out: Path, settings: dict[str, Any]) -> None:
    train(out, **settings)


def _refusal(ranks: Ranks, world_size: int, out: Path, settings: dict[str, Any]) -> str:
    before = sorted(out.rglob("*"))
    told = ranks.outcomes(world_size, _train, out, settings)[0]
    assert told.error == "CheckpointError", str(told)
    assert sorted(out.rglob("*")) == before, "the run can still be gone on with"
    return told.text


@pytest.mark.fault(11, "ranks that cannot share the batch, or have no part of PowerSGD's state")
def test_numbers_of_ranks_that_cannot_go_on_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    _samples(ranks, 2, tmp_path / "a", 3, DENSE)
    told = _refusal(ranks, 3, tmp_path / "a", DENSE)
    assert "batches of 16, which 3 ranks cannot share; start 1, 2, 4, 8, 16 ranks" in told
    powersgd = {**ALL_PHASES, "truncation.compression": "powersgd"}
    _samples(ranks, 2, tmp_path / "b", 3, powersgd)
    told = _refusal(ranks, 1, tmp_path / "b", powersgd)
    assert "PowerSGD's error feedback is kept per rank, so start 2 ranks" in told


@pytest.mark.fault(11, "ranks that cannot share the passes of a batch")
@pytest.mark.fault(12, "what DeepSpeed's file says")
def test_what_deepspeeds_file_says_counts_and_not_where_it_is(tmp_path: Path) -> None:
    """A file that was edited between two parts of a run went unnoticed, and one that had moved was
    refused.  Numbers of ranks were offered that cannot share the passes."""
    out = tmp_path / "run"

    def config(name: str, passes: int) -> RunConfig:
        path = tmp_path / name
        path.write_text(json.dumps({"gradient_accumulation_steps": passes}))
        named = {"distributed.backend": "deepspeed", "distributed.deepspeed": str(path)}
        return read_run_config(CONFIG, list({**SMALL, **named}.items()))

    settings = fixed_settings(config("a.json", 8))
    about = CheckpointInfo(step=3, world_size=2, phase="search", value=None)
    CheckpointManager(out / CHECKPOINTS).save(about, {RUN: {}, SETTINGS: settings})
    with (
        pytest.raises(
            CheckpointError, match=r"4 ranks cannot share in 8 passes each; start 1, 2 ranks$"
        ),
        open_run_folder(out, "auto", config("a.json", 8), 4),
    ):
        pass
    with open_run_folder(out, "auto", config("moved.json", 8), 1) as folder:
        chosen = folder.checkpoint
        assert chosen is not None and chosen.step == 3
    edited = "distributed.deepspeed.gradient_accumulation_steps: 8 -> 4"
    with (
        pytest.raises(ConfigError, match=edited),
        open_run_folder(out, str(chosen.path), config("a.json", 4), 2),
    ):
        pass
