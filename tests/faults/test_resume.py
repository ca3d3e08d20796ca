"""A run that is broken off anywhere and goes on ends as if nothing had happened, to the bit."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.courses import ALL_PHASES, differences_of_runs
from tests.faults.driver import CONFIG, SMALL, small_data
from tests.ranks import Ranks
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.cluster.halt import Halt
from worm_dist.cluster.launch import Place
from worm_dist.cluster.progress import Progress
from worm_dist.training import run, trainer
from worm_dist.training.board import Board
from worm_dist.training.config_file import read_run_config


def _run(out: Path, resume: str = "auto", **settings: Any) -> None:
    """What the command line does, in a process group that is there already."""
    multiprocessing.set_start_method("fork", force=True)  # else each loader imports torch again
    trainer.load_data = lambda _: small_data(dist.get_rank())
    Board.figures = lambda *_: None  # type: ignore[method-assign,assignment]
    pairs = {**SMALL, **settings}
    config = read_run_config(CONFIG, [(key, str(value)) for key, value in pairs.items()])
    place = Place(dist.get_rank(), dist.get_world_size(), 0)
    device = torch.device("cpu")
    with run._own(config, out, resume) as checkpoint, contextlib.redirect_stdout(io.StringIO()):
        run._train(config, out, checkpoint, place, device, Progress(), Halt(), lambda halt: None)
    dist.barrier()


def _gone_on_with(folder: Path, settings: Mapping[str, Any], steps: list[int]) -> None:
    kept = {"checkpoint.every": "1ba", "checkpoint.keep_last": 100}
    _run(folder / "whole", **{**settings, **kept})
    for step in steps:
        path = folder / "whole" / "checkpoints" / f"step-{step}"
        _run(folder / f"from-{step}", resume=str(path), **settings)


@pytest.mark.fault(1, "bit-equal from every phase")
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [3, 4, 6, 8, 10, 13, 23]),
        (
            {"optimizer.name": "adamw", "optimizer.lr": 0.01, "truncation.compression": "powersgd"},
            [3, 5, 11],
        ),
        ({"data.num_workers": 2, "truncation.motion": "hold"}, [5]),
    ],
    ids=["worm", "powersgd", "loaders"],
)
def test_gone_on_with_from_any_step_it_ends_the_same(
    ranks: Ranks, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    for outcome in ranks.outcomes(
        2, _gone_on_with, tmp_path, {**ALL_PHASES, **settings}, steps, wall_limit=90
    ):
        assert outcome.exitcode == 0, str(outcome)
    phases = {
        Checkpoint(path).manifest.phase for path in (tmp_path / "whole" / "checkpoints").iterdir()
    }
    assert {"search", "truncate", "ticket"} >= phases >= {"search", "truncate"}
    for step in steps:
        found = list(differences_of_runs(tmp_path / "whole", tmp_path / f"from-{step}"))
        assert not found, f"from step {step}: " + "\n".join(found[:20])
