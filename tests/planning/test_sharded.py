"""What is forecast for a sharded network is what its ranks handed over, to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

import worm_dist
from tests.nets import Attentive, Residual, random_images
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import Mask, WormConfig
from worm_dist.groups.freeze_plan import FreezePlan
from worm_dist.groups.gates import gated
from worm_dist.planning.forecast import forecast
from worm_dist.planning.target import Target
from worm_dist.planning.wrapper import WrapperSettings, ZeroSettings

pytestmark = [pytest.mark.slow("forecasts beside whole engines")]

SHAPE = (3, 8, 8)


def residual(num_classes: int, in_channels: int) -> nn.Module:
    return Residual(64, 48)


def attentive(num_classes: int, in_channels: int) -> nn.Module:
    return Attentive()


@dataclass(frozen=True)
class _Row:
    """Attributes:
    model: name of a function of this module.
    backend: ``fsdp``, or the stage of ZeRO.
    world_size: number of ranks.
    unit_mb: size of modules that ``fully_shard`` shards by themselves.
    zero, settings: DeepSpeed's settings, in ``zero_optimization`` and beside it.
    truncation: settings of the engine.
    """

    backend: int | str
    model: str = "residual"
    world_size: int = 2
    unit_mb: float = 0.1
    zero: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    truncation: Mapping[str, Any] = field(default_factory=lambda: at_once(2))

    @property
    def all_settings(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            **self.settings,
            "zero_optimization": {"stage": self.backend, **self.zero},
        }

    @property
    def target(self) -> Target:
        if self.backend == "fsdp":
            wrapper = WrapperSettings("fsdp", unit_mb=self.unit_mb)
        else:
            wrapper = WrapperSettings("deepspeed", zero=ZeroSettings.of(self.all_settings))
        worm = WormConfig(truncation=dict(self.truncation))
        return Target(f"{__name__}:{self.model}", SHAPE, 10, worm, wrapper=wrapper)


_SMALL_BUFFERS = {
    "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 20_000,
    "stage3_max_reuse_distance": 60_000,
    "stage3_max_live_parameters": 70_000,
}
ROWS = {
    "fsdp": _Row("fsdp"),
    "fsdp, 4 ranks": _Row("fsdp", world_size=4),
    "fsdp, gates": _Row("fsdp", "attentive", unit_mb=0.5),
    "fsdp, held": _Row("fsdp", truncation={"frozen_weights": "hold"}),
    "zero-0": _Row(0),
    "zero-1": _Row(1),
    "zero-1, 4 ranks, round robin": _Row(1, world_size=4, zero={"round_robin_gradients": True}),
    "zero-2, gates": _Row(2, "attentive"),
    "zero-2, bf16 sums": _Row(2, settings={"communication_data_type": "bf16"}),
    "zero-3": _Row(3),
    "zero-3, 4 ranks": _Row(3, world_size=4, zero=_SMALL_BUFFERS),
    "zero-3, gates": _Row(3, "attentive", zero=_SMALL_BUFFERS),
}


def _wrapped(row: _Row) -> tuple[nn.Module, Any]:
    from worm_dist.training.fully_sharded import shard

    network = gated(row.target.build(), WormConfig().search)
    if row.backend == "fsdp":
        sharded = shard(network, row.unit_mb, row.world_size, torch.device("cpu"))
        return sharded, SGD(sharded.parameters(), lr=0.01)
    from tests.zero.building import engine_around

    optimizer = SGD(network.parameters(), lr=0.01)
    return engine_around(network, optimizer, row.all_settings), None


def _run(row: _Row, folder: Path) -> tuple[dict[str, int], int]:
    """Bytes of a step in every stage, and elements of frozen slices in what this rank steps."""
    torch.manual_seed(0)
    model, optimizer = _wrapped(row)
    engine = worm_dist.attach(
        model,
        optimizer,
        row.target.worm,
        example_inputs=torch.zeros(1, *SHAPE),
        steps_per_epoch=4,
    )
    torch.manual_seed(1)
    keep = {name: torch.rand(size) < 0.5 for name, size in engine.groups.sizes.items()}
    for kept in keep.values():
        kept[0] = True
    mask = Mask(keep)
    number = 0

    def step() -> int:
        nonlocal number
        number += 1
        inputs = random_images(4, seed=2 * number + dist.get_rank())
        loss = engine.model(inputs).square().mean()
        if row.backend == "fsdp":
            loss.backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        else:
            engine.model.backward(loss)  # type: ignore[operator]
            engine.model.step()  # type: ignore[operator]
        return engine.traffic.sent_bytes

    found = {"dense": [step() for _ in range(3)][-1]}
    engine.truncate(mask)
    found["truncated"], *_, found["faded"] = (step() for _ in range(5))
    shards_of = engine._training.optimizer_view.shards
    held = 0
    for parameter, block in FreezePlan(
        engine._training.network, engine.groups, ~mask.keep, "producer"
    ).blocks.items():
        for shard in shards_of(parameter):
            part = block.of_shard(shard.begin, shard.value.shape)
            held += part.shape.numel() - part.num_live
    engine.draw(mask)
    found["ticket"] = [step() for _ in range(3)][-1]
    engine.save_ticket(folder)
    return found, held


@pytest.mark.parametrize("name", ROWS)
def test_a_rank_hands_over_what_is_forecast(name: str, ranks: Ranks, tmp_path: Path) -> None:
    row = ROWS[name]
    outcomes = ranks.outcomes(row.world_size, _run, row, tmp_path / "ticket")
    assert all(outcome.exitcode == 0 for outcome in outcomes), "\n".join(map(str, outcomes))
    found = forecast(row.target, tmp_path / "ticket", None, None, world_size=row.world_size)
    planned = {stage: each.total_bytes for stage, each in found.traffic.items()}
    if "faded" not in planned:
        planned["faded"] = planned["truncated"]
    for outcome in outcomes:
        assert planned == outcome.value[0]
    _, num_held = outcomes[0].value
    assert found.memory["truncated"].truncation.weights == 4 * num_held
