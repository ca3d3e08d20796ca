"""Hugging Face: a callback that puts the engine on a ``transformers.Trainer``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import WormConfig
from ..engine.attach import attach
from ..engine.attachment import is_attached
from ..engine.engine import Engine, ScoreFunction
from ..errors import CheckpointError, ConfigError
from ..groups.nested import mapped
from .ignored_steps import ignoring_steps
from .pretrained import CUTS, note_ticket, restore_ticket
from .progress import Progress
from .rank_files import has_engine_state, load_engine_state, save_engine_state
from .saved_names import translated

__all__ = ["WormTrainerCallback", "restore_ticket"]


class WormTrainerCallback(TrainerCallback):
    """Searches, truncates and draws while ``trainer.train`` runs, on a single process, under
    DistributedDataParallel or FSDP2.

    It adds itself to the trainer::

        trainer = Trainer(model, args, train_dataset=data)
        WormTrainerCallback(trainer, config, example_inputs={"pixel_values": images[:1]})
        trainer.train()

    The penalty is added to the loss before its backward pass; the loss that the trainer logs stays
    without it.  ``trainer.log`` gets the figures of each check.  Checkpoints of the trainer hold
    the engine's state: to resume, build the dense network and give ``resume_from_checkpoint`` as
    usual.  After the draw, ``trainer.save_model`` and ``save_pretrained`` write the small network;
    ``restore_ticket`` reads it.  After ``engine.detach()`` the trainer goes on, saves, loads and
    trains again as if this callback were not there.

    Args:
        trainer: the trainer; it has not trained yet.
        config: the settings; default ``WormConfig()``.
        example_inputs: see ``worm_dist.attach``.
        steps_per_epoch: optimizer steps in an epoch; default is what the data loader's length says.
        score: see ``worm_dist.attach``.

    Attributes:
        engine: the engine, from the start of training on; ``engine.save_ticket(folder)`` writes the
            small network too.

    Raises:
        ConfigError: at the start of training, if the trainer's arguments do not fit; see also
            ``worm_dist.attach``.
    """

    engine: Engine

    def __init__(
        self,
        trainer: Trainer,
        config: WormConfig | None = None,
        *,
        example_inputs: Any,
        steps_per_epoch: int | None = None,
        score: ScoreFunction | None = None,
    ) -> None:
        self._trainer = trainer
        self._config = config
        self._example_inputs = example_inputs
        self._steps_per_epoch = steps_per_epoch
        self._score = score
        self._progress: Progress | None = None
        self._load_later: list[Any] = []
        self._checkpoint: str | None = None
        # What the class does; the trainer's own methods are replaced by those below.
        self._class_step = trainer.training_step
        self._class_backward = trainer.accelerator.backward
        self._class_load = trainer._load_from_checkpoint
        self._class_load_optimizer = trainer._load_optimizer_and_scheduler
        trainer.training_step = self._training_step
        trainer.accelerator.backward = self._backward
        trainer._load_from_checkpoint = self._load_from_checkpoint
        trainer._load_optimizer_and_scheduler = self._load_optimizer_and_scheduler
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach; and if the trainer resumes, restore the engine, then weights and optimizer."""
        trainer = self._trainer
        if self._is_detached:
            self._follow()
            return
        if self._progress is not None:
            raise ConfigError(
                "WormTrainerCallback: its trainer has trained already; make a new trainer"
            )
        _require_fit(trainer)
        self._followed = trainer.model_wrapped
        self.engine = attach(
            trainer.model_wrapped,
            trainer.optimizer,
            self._config,
            example_inputs=mapped(self._example_inputs, lambda tensor: tensor.to(args.device)),
            steps_per_epoch=self._steps_per_epoch or _steps_per_epoch(trainer),
            total_steps=state.max_steps,
            score=self._score,
        )
        if self._checkpoint is not None:
            load_engine_state(self.engine, self._checkpoint)
            self._follow()
            trainer._issue_warnings_after_load = self._require_loaded
            # Shards are saved by their own names.
            with nullcontext() if trainer.is_fsdp_enabled else translated(trainer.model):
                self._class_load(self._checkpoint)
            del trainer._issue_warnings_after_load  # that of the class is left
            ignoring_steps(self.engine, self._class_load_optimizer)(self._checkpoint)
        self._progress = Progress(self.engine)
        self._progress.before_training()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check and draw after an optimizer step; the trainer goes on with the smaller network."""
        assert self._progress is not None
        figures = self._progress.after_pass()
        self._follow()
        if figures is not None:
            logs_later = control.should_log
            self._trainer.log(figures)  # which takes this as the step's only log
            control.should_log = logs_later

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the engine's state in the checkpoint that the trainer has just written."""
        if self._is_detached:
            return
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        save_engine_state(self.engine, folder)

    @property
    def _is_detached(self) -> bool:
        """Whether the user has detached the engine."""
        return self._progress is not None and not is_attached(self.engine)

    def _follow(self) -> None:
        """Let the trainer go on with the engine's present model, at last with the one that
        ``Engine.detach`` has left, unless it has another network by then.  The trainer's ``model``,
        which it evaluates and saves, and its accelerator's are the network itself, which stays the
        same object."""
        if self._trainer.model_wrapped is self._followed:
            self._trainer.model_wrapped = self._followed = self.engine.model
            note_ticket(self.engine, self._trainer.model)

    def _training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The trainer's step with its present model: its loop keeps the one that it began with."""
        if self._progress is None:
            return self._class_step(model, *args, **kwargs)
        self._follow()
        present: Any = self._trainer.model_wrapped
        if model is present:
            return self._class_step(model, *args, **kwargs)
        syncs = getattr(model, "require_backward_grad_sync", True)
        with nullcontext() if syncs else present.no_sync():
            return self._class_step(present, *args, **kwargs)

    def _backward(self, loss: Tensor, **kwargs: Any) -> Any:
        """The accelerator's backward pass of the loss, which is a share of a step's, and the same
        share of the penalty."""
        if self._progress is None or self._is_detached:
            return self._class_backward(loss, **kwargs)
        num_passes = self._trainer.current_gradient_accumulation_steps
        self.engine.watch(loss.detach() * num_passes)
        return self._class_backward(loss + self.engine.penalty() / num_passes, **kwargs)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Let the weights wait: they fit the network only after ``Engine.load_state_dict`` has
        removed channels."""
        if has_engine_state(checkpoint) and not self._is_detached:
            self._checkpoint = checkpoint
        else:
            self._class_load(checkpoint, model)

    def _require_loaded(self, result: Any) -> None:
        """Refuse to go on with initial weights, of which the trainer itself only warns.

        Raises:
            CheckpointError: a weight has not been found in the checkpoint.
        """
        state, missing = self._trainer.model.state_dict(), set(result.missing_keys)
        loaded = {value.data_ptr() for name, value in state.items() if name not in missing}
        for name in result.missing_keys:
            if state[name].data_ptr() not in loaded:  # a tied weight is saved once
                raise CheckpointError(
                    f"{self._checkpoint}: the trainer has not found {name} and "
                    f"{len(missing) - 1} others in it, although the names that save_pretrained "
                    "writes were translated; its version of transformers cannot resume this model"
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Let the optimizer's state wait, too."""
        if self._checkpoint is None or self._is_detached:
            self._class_load_optimizer(checkpoint)


def _require_fit(trainer: Trainer) -> None:
    """Refuse trainers that are not supported.

    Raises:
        ConfigError: naming the first reason.
    """
    if trainer.is_deepspeed_enabled or (
        trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    ):
        raise ConfigError(
            "WormTrainerCallback: the trainer uses DeepSpeed or FSDP1, which is not supported "
            "here; train on a single process, under DistributedDataParallel or FSDP2 (version 2 in "
            "fsdp_config)"
        )
    if trainer.is_fsdp_enabled and hasattr(trainer.model, "generate"):
        raise ConfigError(
            "WormTrainerCallback: under FSDP2 the trainer gathers weights for generate() too, and "
            "this has not been verified; train such networks under DistributedDataParallel"
        )
    if trainer.args.load_best_model_at_end:
        raise ConfigError(
            "WormTrainerCallback: load_best_model_at_end would load weights of before a draw into "
            "the smaller network; set it to False"
        )
    if hasattr(getattr(trainer.model, "config", None), CUTS):
        raise ConfigError(
            "WormTrainerCallback: the network is a ticket already; train it without this callback, "
            "or search in the dense network"
        )


def _steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps in an epoch; None if the data loader has no length."""
    try:
        num_batches: int = len(trainer.callback_handler.train_dataloader)
    except TypeError:
        return None
    num_passes: int = trainer.args.gradient_accumulation_steps
    return max(1, -(-num_batches // num_passes))
