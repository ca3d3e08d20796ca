"""The engine in a Lightning Trainer, on one process and on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.training import (
    BATCH,
    CONFIG,
    EPOCHS,
    NUM_STEPS,
    STATISTICS,
    begin,
    data,
    digest,
    network,
    on_ranks,
    plain_loop,
    progress,
    require_all_phases,
)
from tests.ranks import NO_GROUP, Ranks

pytest.importorskip("lightning.pytorch", reason="the extra worm_dist[lightning] is not installed")
pytestmark = pytest.mark.slow("imports lightning in every rank")


def _fit(
    folder: str,
    name: str,
    world_size: int,
    passes: int = 1,
    resumed_from: Path | None = None,
    is_sharded: bool = False,
) -> tuple[Any, Any, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import ModelParallelStrategy

    from worm_dist.integrations.lightning import WormCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.example_input_array = torch.zeros(1, 1, 8, 8)
            self.scheduled: list[float] = []
            self.ends: list[Any] = []

        def configure_model(self) -> None:
            if is_sharded and not isinstance(self, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                fully_shard(self.network[3], mesh=mesh)
                fully_shard(self, mesh=mesh)

        def forward(self, x: Tensor) -> Any:
            return self.network(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self(x), y)
            self.log("loss", loss)
            self.scheduled.append(self.optimizers().param_groups[0]["lr"])
            return loss

        def on_train_epoch_end(self) -> None:
            self.ends.append(progress(callback.engine))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    callback = WormCallback(CONFIG)
    module = Module()
    checkpoints = Path(folder) / f"checkpoints-{name}"
    strategy: Any = "ddp" if world_size else "auto"
    if is_sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=passes == 1,
        )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=max(1, world_size),
        strategy=strategy,
        max_epochs=EPOCHS,
        accumulate_grad_batches=passes,
        callbacks=[callback, ModelCheckpoint(checkpoints, "{epoch}", save_top_k=-1)],
        logger=CSVLogger(folder, f"logs-{name}", version=0),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dataset = TensorDataset(*data(max(1, world_size), passes))
    trainer.fit(module, DataLoader(dataset, BATCH), ckpt_path=resumed_from)
    return module, callback, trainer


def _state(module: Any, callback: Any, trainer: Any) -> dict[str, Any]:
    return {
        "weights": digest(dict(module.named_parameters())),
        STATISTICS: digest(dict(module.named_buffers())),
        "optimizer": digest(trainer.optimizers[0].state_dict()),
        "steps": callback.engine.step,
        "rates": module.scheduled[-NUM_STEPS:],
        "end": module.ends[-1],
    }


def _course(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    return _fits(folder, world_size, False)


def _sharded_course(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    found = _fits(folder, world_size, True)
    for state in found.values():
        if isinstance(state, dict):
            del state[STATISTICS]  # each rank's own, of which torch saves those of one
    return found


def _fits(folder: str, world_size: int, is_sharded: bool) -> dict[str, Any]:
    fitted = _fit(folder, "unbroken", world_size, is_sharded=is_sharded)
    found = {"unbroken": _state(*fitted), "ends": fitted[0].ends}
    for epoch in (1, 2):
        path = Path(folder) / "checkpoints-unbroken" / f"epoch={epoch}.ckpt"
        resumed = _fit(folder, f"from-{epoch}", world_size, 1, path, is_sharded)
        found[f"from {epoch}"] = _state(*resumed)
    accumulated = _fit(folder, "accumulated", world_size, 2, is_sharded=is_sharded)
    found["accumulated"] = _state(*accumulated)
    return found


@pytest.mark.parametrize(
    ("world_size", "course"), [(NO_GROUP, _course), (2, _course), (2, _sharded_course)]
)
def test_it_draws_and_resumes_to_the_same_bits(
    ranks: Ranks, tmp_path: Path, world_size: int, course: Callable[[str, int], Any]
) -> None:
    found = on_ranks(ranks, world_size, course, tmp_path)
    unbroken = found["unbroken"]
    require_all_phases(found["ends"])
    assert unbroken["steps"] == EPOCHS * NUM_STEPS
    assert world_size or unbroken["optimizer"] == plain_loop()
    assert unbroken["rates"] == [0.0125] * NUM_STEPS
    assert found["from 1"] == unbroken
    assert found["from 2"] == unbroken
    assert found["accumulated"]["end"][0] == "ticket"
    assert found["accumulated"]["steps"] == EPOCHS * NUM_STEPS
    logged = (tmp_path / "logs-unbroken" / "version_0" / "metrics.csv").read_text()
    assert "worm/live_fraction" in logged.splitlines()[0]


def _refused(folder: str, world_size: int) -> dict[str, str]:
    import lightning.pytorch as pl

    from worm_dist import ConfigError
    from worm_dist.integrations.lightning import WormCallback

    class Module(pl.LightningModule):
        def __init__(self, calls_itself: bool, is_automatic: bool) -> None:
            super().__init__()
            self.network = network()
            self.calls_itself = calls_itself
            self.automatic_optimization = is_automatic

        def forward(self, x: Tensor) -> Any:
            return self.network(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self(x) if self.calls_itself else self.network(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    begin(world_size)
    loader = DataLoader(TensorDataset(*data(1)), BATCH)
    images = torch.zeros(1, 1, 8, 8)
    found = {}
    for name, module, inputs in (
        ("manual", Module(True, False), images),
        ("inputs", Module(True, True), None),
        ("call", Module(False, True), images),
    ):
        callback = WormCallback(CONFIG, example_inputs=inputs)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with pytest.raises(ConfigError) as refused:
            trainer.fit(module, loader)
        found[name] = str(refused.value)
        # Lightning tears no callbacks down then: the next fit of this trainer loaded no weights.
        assert "load_model_state_dict" not in vars(trainer.strategy)
    return found


def test_what_does_not_fit_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    found = on_ranks(ranks, NO_GROUP, _refused, tmp_path)
    assert "automatic_optimization" in found["manual"]
    assert "example_input_array" in found["inputs"]
    assert "does not call self(...)" in found["call"]
