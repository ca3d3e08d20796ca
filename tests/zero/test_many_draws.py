"""Many draws in one process: nothing of the engines before is left."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import SGD

import worm_dist
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.zero.building import engine_around, import_deepspeed, settings_of
from worm_dist import WormConfig
from worm_dist.models import build_model

DRAWS = 10


def _megabytes() -> int:
    status = Path("/proc/self/status").read_text().split("\n")
    (line,) = (line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024


def _steps(model: Any, generator: torch.Generator) -> None:
    for _ in range(2):
        model.backward(model(torch.randn(4, 1, 8, 8, generator=generator)).square().mean())
        model.step()


def _draw_again_and_again(stage: int) -> list[tuple[int, int, int, int]]:
    """After each draw: engines alive, file descriptors, threads, megabytes."""
    kind = import_deepspeed().DeepSpeedEngine
    torch.manual_seed(0)
    network = build_model("vgg_small", 10, 1)
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    model = engine_around(network, optimizer, settings_of(stage, steps_per_print=None))
    generator = torch.Generator().manual_seed(dist.get_rank())
    config = WormConfig(truncation={"motion": "hold"})
    left = []
    for _ in range(DRAWS):
        engine = worm_dist.attach(
            model, config=config, example_inputs=torch.randn(1, 1, 8, 8), steps_per_epoch=4
        )
        mask = mask_dropping(engine.groups, 0, 40, 100)
        engine.truncate(mask)
        _steps(engine.model, generator)
        engine.draw(mask)
        _steps(engine.model, generator)
        # A hook that a draw left at a reduction point would find buckets that are not its own.
        model = engine.detach()
        del engine
        gc.collect()
        alive = sum(issubclass(type(thing), kind) for thing in gc.get_objects())
        descriptors, threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
        left.append((alive, descriptors, threads, _megabytes()))
    return left


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ten_draws_leave_one_engine_and_nothing_open(ranks: Ranks, stage: int) -> None:
    outcomes = ranks.outcomes(2, _draw_again_and_again, stage, wall_limit=100, group_timeout=40)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
        alive, descriptors, threads, megabytes = zip(*outcome.value, strict=True)
        assert set(alive) == {1}
        assert len(set(descriptors[1:])) == 1 and len(set(threads[1:])) == 1
        # The allocator's own wandering; a network and its state are several megabytes each time.
        assert megabytes[-1] - megabytes[1] < 16
