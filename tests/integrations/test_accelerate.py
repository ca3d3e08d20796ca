"""The engine in a loop with Accelerate, on one process and on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.training import (
    BATCH,
    CONFIG,
    EPOCHS,
    FIGURES,
    NUM_STEPS,
    STATISTICS,
    begin,
    data,
    digest,
    let_accelerate_shard,
    network,
    on_ranks,
    plain_loop,
    progress,
    require_all_phases,
)
from tests.ranks import NO_GROUP, Ranks

pytest.importorskip("accelerate", reason="the extra worm_dist[hf] is not installed")
pytestmark = pytest.mark.slow("imports accelerate in every rank")


def _train(
    folder: str,
    name: str,
    world_size: int,
    passes: int = 1,
    resumed_from: int | None = None,
    plugin: Any = None,
) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from worm_dist.integrations.accelerate import AcceleratedEngine

    class Tracker(GeneralTracker):
        name = "kept"
        requires_logging_directory = False
        tracker = None

        def store_init_configuration(self, values: Any) -> None: ...

        def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
            figures.append((step, values["worm/live_fraction"]))

    figures: list[Any] = []
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=plugin,
        gradient_accumulation_steps=passes,
        log_with=Tracker(),
        step_scheduler_with_optimizer=False,
    )
    accelerator.init_trackers("test")
    dense = network()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, NUM_STEPS, 0.5)
    images, classes = data(max(1, world_size), passes)
    loader = DataLoader(TensorDataset(images, classes), BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(dense, optimizer, loader, scheduler)
    worm = AcceleratedEngine(
        accelerator, model, optimizer, CONFIG, example_inputs=images[:1], steps_per_epoch=NUM_STEPS
    )
    first = 0
    if resumed_from is not None:
        accelerator.load_state(f"{folder}/unbroken-{resumed_from}")
        first = resumed_from
    if plugin is not None:
        accelerator.save_state(f"{folder}/{name}-begin")  # makes the optimizer's state by a step
    ends = []
    for epoch in range(first, EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(worm.model):
                worm.backward(nn.functional.cross_entropy(worm.model(x), y))
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
                worm.step()
        ends.append(progress(worm.engine))
        accelerator.save_state(f"{folder}/{name}-{epoch + 1}")
    worm.detach()
    accelerator.save_state(f"{folder}/{name}-detached")
    accelerator.wait_for_everyone()  # rank zero writes the weights
    accelerator.load_state(f"{folder}/{name}-detached")
    assert not list(Path(f"{folder}/{name}-detached").glob("worm_engine*"))
    return {
        "weights": digest(dict(dense.named_parameters())),
        STATISTICS: digest(dict(dense.named_buffers())),
        "optimizer": digest(optimizer.state_dict()),
        "steps": worm.engine.step,
        "rate": scheduler.get_last_lr(),
        "ends": ends,
        FIGURES: figures,
    }


def _course(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    return _trainings(folder, world_size, None)


def _trainings(folder: str, world_size: int, plugin: Any) -> dict[str, Any]:
    return {
        "unbroken": _train(folder, "unbroken", world_size, plugin=plugin),
        "from 2": _train(folder, "from-2", world_size, 1, 2, plugin=plugin),
        "from 3": _train(folder, "from-3", world_size, 1, 3, plugin=plugin),
        "accumulated": _train(folder, "accumulated", world_size, 2, plugin=plugin),
    }


def _sharded_course(folder: str, world_size: int) -> dict[str, Any]:
    from accelerate.utils import FullyShardedDataParallelPlugin

    begin(world_size)
    let_accelerate_shard()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=500
    )
    found = _trainings(folder, world_size, plugin)
    for training in found.values():
        del training[STATISTICS]  # each rank's own, of which torch saves those of one
    found["FSDP1"] = _refused(FullyShardedDataParallelPlugin(fsdp_version=1))
    return found


def _refused(plugin: Any) -> str:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from worm_dist import ConfigError
    from worm_dist.integrations.accelerate import AcceleratedEngine

    AcceleratorState._reset_state()
    let_accelerate_shard()
    dense = network()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    with pytest.raises(ConfigError) as refused:
        AcceleratedEngine(
            Accelerator(cpu=True, fsdp_plugin=plugin), dense, optimizer, example_inputs=data(1)[0]
        )
    return str(refused.value)


@pytest.mark.parametrize(
    ("world_size", "course"), [(NO_GROUP, _course), (2, _course), (2, _sharded_course)]
)
def test_it_draws_and_resumes_to_the_same_bits(
    ranks: Ranks, tmp_path: Path, world_size: int, course: Callable[[str, int], Any]
) -> None:
    found = on_ranks(ranks, world_size, course, tmp_path)
    assert "fsdp_version=2" in found.get("FSDP1", "fsdp_version=2")
    unbroken = found["unbroken"]
    require_all_phases(unbroken["ends"])
    assert unbroken["steps"] == EPOCHS * NUM_STEPS
    assert world_size or unbroken["optimizer"] == plain_loop()
    assert unbroken["rate"] == [0.00625]
    assert unbroken[FIGURES][0][1] == 1.0 > unbroken[FIGURES][-1][1]
    for epoch in (2, 3):
        resumed = found[f"from {epoch}"]
        since = [figures for figures in unbroken[FIGURES] if figures[0] > epoch * NUM_STEPS]
        assert resumed == {**unbroken, "ends": unbroken["ends"][epoch:], FIGURES: since}
    assert found["accumulated"]["ends"][-1][0] == "ticket"
    assert found["accumulated"]["steps"] == EPOCHS * NUM_STEPS
