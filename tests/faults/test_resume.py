"""A run that is broken off anywhere and goes on ends as if nothing had happened, to the bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.faults.courses import ALL_PHASES, differences_of_runs, last_state
from tests.faults.training import train
from tests.ranks import Ranks
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.training.trainer import Trainer


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
        (2, {"data.num_workers": 2, "truncation.motion": "hold"}, [5]),
    ],
    ids=["worm", "three", "powersgd", "loaders"],
)
def test_gone_on_with_from_any_step_it_ends_the_same(
    ranks: Ranks, tmp_path: Path, world_size: int, settings: dict[str, Any], steps: list[int]
) -> None:
    for outcome in ranks.outcomes(
        world_size, _gone_on_with, tmp_path, {**ALL_PHASES, **settings}, steps, wall_limit=90
    ):
        assert outcome.exitcode == 0, str(outcome)
    phases = {
        Checkpoint(path).manifest.phase for path in (tmp_path / "whole" / "checkpoints").iterdir()
    }
    assert {"search", "truncate", "ticket"} >= phases >= {"search", "truncate"}
    for step in steps:
        found = list(differences_of_runs(tmp_path / "whole", tmp_path / f"from-{step}"))
        assert not found, f"from step {step}: " + "\n".join(found[:20])


# ---- DeepSpeed -----------------------------------------------------------------------------------


def _under_deepspeed(folder: Path, steps: list[int]) -> None:
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()))
    os.environ.update(WORLD_SIZE=str(dist.get_world_size()), MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT="1")
    _gone_on_with(folder, {**ALL_PHASES, "distributed.backend": "deepspeed"}, steps)


@pytest.mark.timeout(200)
@pytest.mark.fault(1, "bit-equal under ZeRO stage 1")
def test_under_zero_it_ends_the_same(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    steps = [5, 13]
    for outcome in ranks.outcomes(2, _under_deepspeed, tmp_path, steps, wall_limit=150):
        assert outcome.exitcode == 0, str(outcome)
    for step in steps:
        found = list(differences_of_runs(tmp_path / "whole", tmp_path / f"from-{step}"))
        assert not found, f"from step {step}: " + "\n".join(found[:20])


# ---- another number of ranks ---------------------------------------------------------------------

DENSE = {"preset": "dense", "optimizer.lr": 0.01}


def _samples_of_steps(out: Path, num_steps: int, settings: dict[str, Any]) -> list[list[float]]:
    """Train so many steps on; the samples that this rank has been given, by their sums."""
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


@pytest.mark.fault(11, "from two ranks to one and back, with the same global batch")
@pytest.mark.parametrize("settings", [DENSE, {**ALL_PHASES, "epochs": 2}], ids=["dense", "worm"])
def test_on_another_number_of_ranks_each_step_has_the_same_samples(
    ranks: Ranks, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The second part begins and ends in the middle of an epoch; it finds and draws the ticket."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    wanted = _global_batches(ranks(2, _samples_of_steps, whole, 100, settings))
    found = []
    for world_size, num_steps in ((2, 3), (1, 8), (2, 100)):
        found += _global_batches(ranks(world_size, _samples_of_steps, out, num_steps, settings))
    assert found == wanted
    assert all(len({*found[at], *found[at + 1]}) == 32 for at in range(7)), "none comes twice"
    one, other = last_state(whole)["network"], last_state(out)["network"]
    for name, tensor in one.items():
        # BatchNorm sees as many samples as a rank has.
        assert torch.allclose(tensor.float(), other[name].float(), atol=0.1), name


def _train(out: Path, settings: dict[str, Any]) -> None:
    train(out, **settings)


@pytest.mark.fault(11, "ranks that cannot share the batch, or have no part of PowerSGD's state")
def test_numbers_of_ranks_that_cannot_go_on_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _samples_of_steps, tmp_path / "a", 3, DENSE)
    told = ranks.outcomes(3, _train, tmp_path / "a", DENSE)[0]
    assert told.error == "ConfigError"
    assert "batches of 16, which 3 ranks cannot share; start one of 1, 2, 4, 8, 16" in told.text
    powersgd = {**ALL_PHASES, "truncation.compression": "powersgd"}
    ranks(2, _samples_of_steps, tmp_path / "b", 3, powersgd)
    (told,) = ranks.outcomes(1, _train, tmp_path / "b", powersgd)
    assert told.error == "ConfigError"
    assert "what PowerSGD leaves out is kept on each rank, so start 2" in told.text
