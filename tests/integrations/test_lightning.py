"""The engine in a Lightning Trainer, on one process and on two ranks."""

from __future__ import annotations

import weakref
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
    from worm_dist.integrations.lightning import WormCallback

    callback = WormCallback(CONFIG)
    module = _module(is_sharded, callback)
    trainer = _trainer(folder, name, world_size, passes, is_sharded, [callback])
    trainer.fit(module, _loader(world_size, passes), ckpt_path=resumed_from)
    return module, callback, trainer


def _loader(world_size: int, passes: int = 1) -> Any:
    return DataLoader(TensorDataset(*data(max(1, world_size), passes)), BATCH)


def _module(is_sharded: bool, callback: Any = None, detached_at: int | None = None) -> Any:
    """
    Args:
        callback: the engine's, if there is one.
        detached_at: the step after which the user detaches the engine.
    """
    import lightning.pytorch as pl

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
            self.last_wrapper = weakref.ref(self.trainer.strategy.model)
            if callback is not None:
                self.ends.append(progress(callback.engine))

        def on_train_batch_end(self, *unused: Any) -> None:
            if self.global_step == detached_at:
                callback.engine.detach()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    return Module()


def _trainer(
    folder: str, name: str, world_size: int, passes: int, is_sharded: bool, callbacks: list[Any]
) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import ModelParallelStrategy

    checkpoints = Path(folder) / f"checkpoints-{name}"
    strategy: Any = "ddp" if world_size else "auto"
    if is_sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=passes == 1,
        )
    return pl.Trainer(
        accelerator="cpu",
        devices=max(1, world_size),
        strategy=strategy,
        max_epochs=EPOCHS,
        accumulate_grad_batches=passes,
        callbacks=[*callbacks, ModelCheckpoint(checkpoints, "{epoch}", save_top_k=-1)],
        logger=CSVLogger(folder, f"logs-{name}", version=0),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _trained(module: Any, trainer: Any) -> dict[str, Any]:
    return {
        "weights": digest(dict(module.named_parameters())),
        STATISTICS: digest(dict(module.named_buffers())),
        "optimizer": digest(trainer.optimizers[0].state_dict()),
        "rates": module.scheduled[-NUM_STEPS:],
    }


def _state(module: Any, callback: Any, trainer: Any) -> dict[str, Any]:
    trained = _trained(module, trainer)
    return {**trained, "steps": callback.engine.step, "end": module.ends[-1]}


def _course(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    return _fits(folder, world_size, False)


def _sharded_course(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    return _without_statistics(_fits(folder, world_size, True))


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


_DETACHED_AT = 5
"""A step in which channels are frozen, and none has been removed."""
_FITS = [(NO_GROUP, False), (2, False), (2, True)]


def _detached_while_channels_are_frozen(
    folder: str, world_size: int, is_sharded: bool
) -> dict[str, Any]:
    from worm_dist.integrations.lightning import WormCallback

    begin(world_size)
    callback = WormCallback(CONFIG)
    module = _module(is_sharded, callback, _DETACHED_AT)
    trainer = _trainer(folder, "on", world_size, 1, is_sharded, [callback])
    trainer.fit(module, _loader(world_size))
    found: dict[str, Any] = {"ends": [*module.ends], "went on": _trained(module, trainer)}
    found["dense"] = sum(parameter.numel() for parameter in network().parameters())
    without = _trainer(folder, "without", world_size, 1, is_sharded, [])
    for name, again, module_again in (
        ("without", without, _module(is_sharded)),
        ("again", trainer, module),
    ):
        path = Path(folder) / "checkpoints-on" / "epoch=0.ckpt"
        _fit_again(again, module_again, path)
        found[name] = _trained(module_again, again)
    found["has its own"] = module.last_wrapper() is not callback.engine.model
    return _without_statistics(found) if is_sharded else found


def _fit_again(trainer: Any, module: Any, path: Path) -> None:
    """Without the last gradients, which Lightning leaves; torch, which loads an optimizer's shards,
    would take them for a sign that it has a state already."""
    module.zero_grad()
    trainer.fit(module, _loader(max(1, trainer.world_size)), ckpt_path=path)


def _without_statistics(found: dict[str, Any]) -> dict[str, Any]:
    """Each rank has its own, of which torch saves those of one."""
    for state in found.values():
        if isinstance(state, dict):
            del state[STATISTICS]
    return found


@pytest.mark.parametrize(("world_size", "is_sharded"), _FITS)
def test_after_detaching_it_trains_as_if_the_callback_were_not_there(
    ranks: Ranks, tmp_path: Path, world_size: int, is_sharded: bool
) -> None:
    """The next checkpoint asked the detached engine for its state, which ended the training; and
    the trainer could not fit again."""
    course = _detached_while_channels_are_frozen
    found = on_ranks(ranks, world_size, course, tmp_path, is_sharded)
    assert found["ends"] == [("truncate", found["dense"])] * EPOCHS
    assert found["without"] == found["went on"]
    assert found["again"] == found["went on"]
    assert found["has its own"] == (world_size > 1 and not is_sharded)  # wrapper


def _detached_from_a_ticket(folder: str, world_size: int, is_sharded: bool) -> dict[str, Any]:
    begin(world_size)
    module, callback, trainer = _fit(folder, "on", world_size, is_sharded=is_sharded)
    found = {"end": module.ends[-1], "trained": _trained(module, trainer)}
    callback.engine.detach()
    path = Path(folder) / "checkpoints-on" / "epoch=2.ckpt"
    _fit_again(trainer, module, path)
    found["again"] = _trained(module, trainer)
    return _without_statistics(found) if is_sharded else found


@pytest.mark.parametrize(("world_size", "is_sharded"), _FITS)
def test_a_detached_ticket_trains_again(
    ranks: Ranks, tmp_path: Path, world_size: int, is_sharded: bool
) -> None:
    """From a checkpoint that has an engine's state: it has the ticket's weights, too."""
    found = on_ranks(ranks, world_size, _detached_from_a_ticket, tmp_path, is_sharded)
    assert found["end"][0] == "ticket"
    assert found["again"] == found["trained"]


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
