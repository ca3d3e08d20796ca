"""What the trainings of all trainers have in common: settings, data and what is compared."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import worm_dist
from tests.ranks import NO_GROUP, RankFailure, Ranks
from worm_dist import Engine, WormConfig
from worm_dist.digest import digest_of
from worm_dist.groups.nested import mapped

__all__ = [
    "BATCH",
    "CONFIG",
    "EPOCHS",
    "FIGURES",
    "NUM_STEPS",
    "STATISTICS",
    "begin",
    "data",
    "digest",
    "let_accelerate_shard",
    "network",
    "on_ranks",
    "plain_loop",
    "progress",
    "require_all_phases",
]

EPOCHS = 4
NUM_STEPS = 8
"""Optimizer steps in an epoch."""
BATCH = 4
"""Images of a rank in a step."""
CONFIG = WormConfig(
    search={
        "every": "2ba",
        "window": 3,
        "settled": 0.3,
        "elbow": {"min_masks": 2, "margin": 0.3, "latest": None},
        "prune_ratio": 0.4,
        "threshold": "global",
        "l1": 0.05,
    },
    truncation={"removal": {"duration": "20ba", "fade_steps": 2, "stage": 0.3}},
    ticket={"recalibrate_batches": 3},
)
"""Truncates in the first epoch, draws stages in the second, and the ticket before the third."""

PHASES = ["truncate 8", "truncate 8", "ticket 6"]
"""The phase at the end of each epoch, and the width of the first layer."""
STATISTICS = "statistics"
FIGURES = "figures"
"""Keys of what each rank has to itself: BatchNorm's statistics after the last pass, and what its
logger has seen."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 4),
    )


def data(world_size: int, passes: int = 1) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]`` and classes of one epoch of ``NUM_STEPS`` steps of all ranks."""
    generator = torch.Generator().manual_seed(1)
    size = NUM_STEPS * BATCH * world_size * passes
    classes = torch.randint(4, (size,), generator=generator)
    images = torch.randn(size, 1, 8, 8, generator=generator) + classes.view(-1, 1, 1, 1)
    return images, classes


def begin(world_size: int) -> None:
    """Tell trainers in the environment what a launcher would, and ignore their warnings."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if world_size == NO_GROUP:
        return
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank)
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # joined already; never used


def let_accelerate_shard() -> None:
    """Tell Accelerate that ranks have GPUs: it shards there alone, and ignores it elsewhere."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def progress(engine: Engine) -> tuple[str, int]:
    """The phase, and the number of parameters."""
    return str(engine.phase), sum(parameter.numel() for parameter in engine.model.parameters())


def require_all_phases(ends: Sequence[tuple[str, int]]) -> None:
    """Require that the epochs ended before a stage, after one, and with the ticket.

    Args:
        ends: ``progress`` at the end of each epoch.
    """
    phases, sizes = zip(*ends, strict=True)
    assert phases == ("truncate", "truncate", "ticket", "ticket")
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]


def plain_loop() -> str:
    """The digest of the optimizer's state at the end of a loop without a trainer."""
    dense = network()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    images, classes = data(1)
    engine = worm_dist.attach(
        dense, optimizer, CONFIG, example_inputs=images[:1], steps_per_epoch=NUM_STEPS
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(EPOCHS):
        for x, y in zip(images.split(BATCH), classes.split(BATCH), strict=True):
            loss = nn.functional.cross_entropy(dense(x), y)
            engine.watch(loss)
            (loss + engine.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            verdict = engine.check()
            if verdict.stage or verdict.ticket:
                engine.draw()
        scheduler.step()
    return digest(optimizer.state_dict())


def digest(values: Mapping[str, Any]) -> str:
    """Of tensors and plain values, to the bit.  Collective if tensors are sharded."""
    return digest_of(mapped(dict(values), _whole)).hex()


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def on_ranks(ranks: Ranks, world_size: int, function: Any, folder: Path, *arguments: Any) -> Any:
    """What the function returns on every rank, which has to be the same; importing a trainer may
    take long on a busy machine."""
    given = str(folder), world_size, *arguments
    outcomes = ranks.outcomes(world_size, function, *given, group_timeout=120)
    if any(outcome.exitcode != 0 for outcome in outcomes):
        raise RankFailure("\n".join(map(str, outcomes)))
    first, *others = (_shared(outcome.value) for outcome in outcomes)
    assert all(other == first for other in others)
    return outcomes[0].value


def _shared(found: Any) -> Any:
    if isinstance(found, dict):
        return {
            key: _shared(value) for key, value in found.items() if key not in (STATISTICS, FIGURES)
        }
    return found
