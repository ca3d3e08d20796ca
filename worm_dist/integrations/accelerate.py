"""Accelerate: the engine in a loop with an ``accelerate.Accelerator``."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import WormConfig
from ..engine.attach import attach
from ..engine.engine import Engine, ScoreFunction
from ..errors import ConfigError
from .ignored_steps import ignoring_steps
from .progress import Progress
from .rank_files import has_engine_state, load_engine_state, save_engine_state

__all__ = ["AcceleratedEngine"]

_SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")


class AcceleratedEngine:
    """An engine in a loop with an ``Accelerator``, on a single process, under
    DistributedDataParallel or FSDP2::

        model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        worm = AcceleratedEngine(accelerator, model, optimizer, config, example_inputs=x[:1],
                                 steps_per_epoch=len(loader), total_steps=epochs * len(loader))
        for x, y in loader:
            with accelerator.accumulate(worm.model):
                worm.backward(criterion(worm.model(x), y))
                optimizer.step()
                optimizer.zero_grad()
                worm.step()

    Always call ``worm.model``, which a draw replaces; optimizer and scheduler stay the same
    objects.  ``accelerator.save_state`` saves the engine too, and ``accelerator.load_state``
    restores it, if the dense network was prepared and this object made before.

    Args:
        accelerator: the accelerator that has prepared model and optimizer.
        model: the prepared model.
        optimizer: the prepared optimizer.
        config: the settings; default ``WormConfig()``.
        example_inputs: see ``worm_dist.attach``.
        steps_per_epoch: optimizer steps in an epoch; with gradient accumulation fewer than batches.
        total_steps: optimizer steps of the whole training.
        score: see ``worm_dist.attach``.

    Attributes:
        engine: the engine; ``engine.save_ticket(folder)`` writes the small network.

    Raises:
        ConfigError: the accelerator trains the model in an unsupported way; see also
            ``worm_dist.attach``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        config: WormConfig | None = None,
        *,
        example_inputs: Any,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        score: ScoreFunction | None = None,
    ) -> None:
        kind = accelerator.distributed_type
        if kind not in [DistributedType[name] for name in _SUPPORTED]:
            raise ConfigError(
                f"AcceleratedEngine: the accelerator's distributed_type is {kind.value}, which is "
                "not supported; use a single process, DistributedDataParallel or FSDP2"
            )
        is_sharded = kind == DistributedType.FSDP
        if is_sharded and not accelerator.is_fsdp2:
            raise ConfigError(
                "AcceleratedEngine: the accelerator uses FSDP1, which flattens parameters; give it "
                "FullyShardedDataParallelPlugin(fsdp_version=2)"
            )
        self.engine: Engine = attach(
            model,
            optimizer,
            config,
            example_inputs=example_inputs,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            score=score,
        )
        self._accelerator = accelerator
        self._progress = Progress(self.engine)
        self._hooks = [accelerator.register_save_state_pre_hook(self._save)]
        if is_sharded:
            self._load_shards = ignoring_steps(self.engine, accelerator.load_state)
            accelerator.load_state = self._load_state
            accelerator.save_state = ignoring_steps(self.engine, accelerator.save_state)
        else:
            self._hooks.append(accelerator.register_load_state_pre_hook(self._load))

    @property
    def model(self) -> nn.Module:
        """The model to train; after a draw, the smaller network in a wrapper of the same kind."""
        return self.engine.model

    def detach(self) -> nn.Module:
        """Remove the engine, also from what the accelerator saves and loads.  Collective; see
        ``Engine.detach``.

        Returns:
            The model to continue with.
        """
        for hook in self._hooks:
            hook.remove()
        for name in ("load_state", "save_state"):  # those of the class are left
            vars(self._accelerator).pop(name, None)
        return self.engine.detach()

    def backward(self, loss: Tensor) -> None:
        """Report the loss, and call ``accelerator.backward`` for it and the penalty.

        Args:
            loss: the loss of a forward pass, a scalar, as ``accelerator.backward`` expects it.
        """
        self._progress.before_training()  # a saved state may have been loaded until now
        self.engine.watch(loss.detach())
        self._accelerator.backward(loss + self.engine.penalty())

    def step(self) -> None:
        """Check and draw, if the optimizer has taken a step since the last call; log the figures
        of a check to the accelerator's trackers.  Collective: call it after every
        ``optimizer.step()``.

        Raises:
            WormError: as in ``Engine.check`` and ``Engine.draw``.
        """
        figures = self._progress.after_pass()
        if figures is not None:
            self._accelerator.log(figures, step=self.engine.step)

    def _save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        save_engine_state(self.engine, folder)

    def _load(self, models: list[nn.Module], folder: str) -> None:
        """Restore the engine before Accelerate loads the weights: into the network itself, which
        stays the same object, and not into its wrapper."""
        if has_engine_state(folder):
            load_engine_state(self.engine, folder)
            self._progress = Progress(self.engine)

    def _load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Restore the engine before Accelerate loads the shards, which it does before its hooks.

        Raises:
            ConfigError: no folder is given.
        """
        if input_dir is None:
            raise ConfigError("load_state: under FSDP2 give it the folder of the saved state")
        self._load([], input_dir)
        self._load_shards(input_dir, *args, **kwargs)
