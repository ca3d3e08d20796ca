"""Lightning: a callback that puts the engine on a ``lightning.pytorch.Trainer``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor

from ..config import WormConfig
from ..engine.attach import attach
from ..engine.attachment import context_of, is_attached
from ..engine.engine import Engine, ScoreFunction
from ..errors import ConfigError
from ..groups.nested import mapped
from ..training.rank_state import gathered_on_rank_zero
from ..verdict import Phase
from .ignored_steps import ignoring_steps
from .progress import Progress

__all__ = ["WormCallback"]


class WormCallback(Callback):
    """Searches, truncates and draws while ``trainer.fit`` runs, on a single device, under ``ddp``,
    or under ``ModelParallelStrategy`` if ``configure_model`` calls ``fully_shard`` for the module.

    The network is the LightningModule: ``forward`` is traced, and ``training_step`` must call
    ``self(...)``, because BatchNorm statistics are estimated from the inputs of that call.  The
    penalty is added to the loss before its backward pass; the loss that Lightning logs stays
    without it.  The figures of each check go to the trainer's loggers.  Checkpoints of the trainer
    hold the engine's state: to resume, build the dense network and give ``ckpt_path`` as usual.
    After ``engine.detach()`` the trainer goes on, saves, loads and fits again as if this callback
    were not there.

    Args:
        config: the settings; default ``WormConfig()``.
        example_inputs: see ``worm_dist.attach``; default is the module's ``example_input_array``.
        score: see ``worm_dist.attach``.

    Attributes:
        engine: the engine, from the start of ``fit`` on; ``engine.save_ticket(folder)`` writes the
            small network.

    Raises:
        ConfigError: at the start of ``fit``, if strategy, optimizers or module do not fit; see also
            ``worm_dist.attach``.
    """

    engine: Engine

    def __init__(
        self,
        config: WormConfig | None = None,
        *,
        example_inputs: Any = None,
        score: ScoreFunction | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._example_inputs = example_inputs
        self._score = score
        self._progress: Progress | None = None
        self._saved: Mapping[str, Any] | None = None
        self._load_weights: Callable[[], None] | None = None
        self._has_seen_inputs = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the weights of a checkpoint wait: Lightning loads them before the optimizer is made,
        but they fit the network only after ``Engine.load_state_dict`` has removed channels."""
        if stage != "fit" or self._is_detached:
            return
        load = trainer.strategy.load_model_state_dict

        def load_later(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            if self.state_key in checkpoint.get("callbacks", {}):
                self._load_weights = partial(load, checkpoint, strict=strict)
            else:
                load(checkpoint, strict=strict)

        trainer.strategy.load_model_state_dict = load_later
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._load_shards = trainer.strategy.load_checkpoint
            trainer.strategy.load_checkpoint = self._load_sharded

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the strategy load weights as before."""
        for name in ("load_model_state_dict", "load_checkpoint", "optimizer_state"):
            vars(trainer.strategy).pop(name, None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tear down, which Lightning does not do after an error."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; and if the trainer resumes, restore the engine, and then the weights."""
        if self._is_detached:
            return
        if self._progress is not None:
            raise ConfigError("WormCallback: it belongs to an earlier fit; make a new one")
        _require_fit(trainer, pl_module)
        inputs = self._example_inputs
        if inputs is None:
            inputs = pl_module.example_input_array
        if inputs is None:
            raise ConfigError("WormCallback: give example_inputs, or set example_input_array")
        trainer.fit_loop.setup_data()  # an epoch's length is not known otherwise
        num_batches = trainer.num_training_batches
        is_known = isinstance(num_batches, int) and num_batches > 0
        self.engine = attach(
            trainer.strategy.model,
            trainer.optimizers[0],
            self._config,
            example_inputs=mapped(inputs, lambda tensor: tensor.to(pl_module.device)),
            steps_per_epoch=-(-num_batches // trainer.accumulate_grad_batches)
            if is_known
            else None,
            total_steps=_total_steps(trainer),
            score=self._score,
        )
        if self._saved is not None:
            self.engine.load_state_dict(_part_of_rank(self._saved))
            self._saved = None
        trainer.strategy.model = self._followed = self.engine.model
        if self._load_weights is not None:
            self._load_weights()
            self._load_weights = None
        if isinstance(trainer.strategy, ModelParallelStrategy):
            state = trainer.strategy.optimizer_state
            trainer.strategy.optimizer_state = ignoring_steps(self.engine, state)
        self._progress = Progress(self.engine)

    @property
    def _is_detached(self) -> bool:
        """Whether the user has detached the engine."""
        return self._progress is not None and not is_attached(self.engine)

    def _follow(self, trainer: Trainer) -> None:
        """Let the trainer go on with the engine's present model, at last with the one that
        ``Engine.detach`` has left.  A later fit wraps the network again; that wrapper is kept."""
        if trainer.strategy.model is self._followed:
            trainer.strategy.model = self._followed = self.engine.model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first mask, if it is due before training."""
        if self._is_detached:
            return
        assert self._progress is not None
        self._progress.before_training()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follow an engine that has been detached since the last batch."""
        self._follow(trainer)

    def _load_sharded(self, path: str | Path, weights_only: bool | None = None) -> Any:
        """Restore the engine before Lightning reads the shards, which it does once the optimizer
        is made, and before it gives callbacks their state."""
        file = Path(path) / _METADATA_FILENAME if Path(path).is_dir() else Path(path)
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
        state = saved.get("callbacks", {}).get(self.state_key)
        if state:
            self.engine.load_state_dict(_part_of_rank(state))
            self._progress = Progress(self.engine)
        return ignoring_steps(self.engine, self._load_shards)(path, weights_only=weights_only)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Report the loss, and add the penalty in place; so loss and penalty are scaled alike."""
        if self._is_detached:
            return
        share = loss.new_tensor(1 / trainer.accumulate_grad_batches, dtype=torch.float32)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            share = scaler.scale(share)
        self.engine.watch(loss.detach() / share)
        loss.add_(self.engine.penalty() * share)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Check and draw after an optimizer step; the trainer goes on with the smaller network."""
        if self._is_detached:
            self._follow(trainer)
            return
        self._require_inputs_seen()
        assert self._progress is not None
        figures = self._progress.after_pass()
        self._follow(trainer)
        if figures is not None:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The engine's state with the parts of all ranks, for rank zero to save.  Collective."""
        if self._progress is None or self._is_detached:
            return {}
        state = self.engine.state_dict()
        own = state.pop("rank")
        device = next(self.engine.model.parameters()).device
        return {
            **state,
            "ranks": gathered_on_rank_zero(own, device) if dist.is_initialized() else [own],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a state until the engine is attached."""
        self._saved = state_dict

    def _require_inputs_seen(self) -> None:
        if self._has_seen_inputs or self.engine.phase is Phase.TICKET:
            return
        inputs = context_of(self.engine).inputs
        if inputs.is_on and not inputs.calls:
            raise ConfigError(
                "WormCallback: training_step does not call self(...), so the inputs from which "
                "BatchNorm statistics are estimated are not known; call the network by self(...)"
            )
        self._has_seen_inputs = True


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole fit; None if it has no end."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total >= 1 else None


def _require_fit(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse trainers that are not supported.

    Raises:
        ConfigError: naming the first reason.
    """
    kinds = DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
    if not isinstance(trainer.strategy, kinds):
        raise ConfigError(
            f"WormCallback: the strategy is {type(trainer.strategy).__name__}, which is not "
            "supported; use strategy='ddp', a single device, or ModelParallelStrategy with "
            "fully_shard (FSDP2)"
        )
    if not pl_module.automatic_optimization:
        raise ConfigError(
            "WormCallback: the module has automatic_optimization = False; attach an engine in its "
            "own training_step instead, or let Lightning step the optimizer"
        )
    if len(trainer.optimizers) != 1:
        raise ConfigError(
            f"WormCallback: configure_optimizers returns {len(trainer.optimizers)} optimizers; "
            "give one that has all parameters"
        )
    averaging = [
        type(callback).__name__
        for callback in trainer.callbacks
        if any("WeightAveraging" in kind.__name__ for kind in type(callback).__mro__)
    ]
    if averaging:
        raise ConfigError(
            f"WormCallback: {averaging[0]} keeps a copy of the network, which a draw would not "
            "prune; train without it"
        )


def _part_of_rank(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's state of this rank; of rank zero if another number of ranks has saved it."""
    ranks = saved["ranks"]
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    state = {key: value for key, value in saved.items() if key != "ranks"}
    return {**state, "rank": ranks[rank] if len(ranks) == size else ranks[0]}
