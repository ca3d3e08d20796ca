"""DeepSpeed: a network in a DeepSpeed engine, ZeRO stages 0 to 2; see ``zero3`` for stage 3."""

from __future__ import annotations

import copy
import gc
import logging
import sys
from collections.abc import Collection
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..comm_hooks.deepspeed_reduce import DeepSpeedReducer
from ..comm_hooks.reducer import Reducer
from ..config import TruncationConfig
from ..distributed.collectives import Communicator, ProcessGroupComm
from ..errors import BackendError, ConfigError
from .backend import not_compiled
from .deepspeed_optimizer import CopyingOptimizerView, PartitionedOptimizerView, partition_shards
from .deepspeed_refusals import require_known
from .optimizer_view import OptimizerView
from .trained_parameters import only_these_train
from .whole_weights import WholeWeights

__all__ = ["DeepSpeedBackend", "is_deepspeed"]

logger = logging.getLogger(__name__)

_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_BATCH_SIZES = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_CARRIED = (
    "global_steps",
    "global_samples",
    "micro_steps",
    "skipped_steps",
    "lr_scheduler",
    "monitor",
    "training_dataloader",
    "tput_timer",
)
"""Attributes of an engine that are carried over to the engine built after a draw."""


def is_deepspeed(model: nn.Module) -> bool:
    """Whether a model is a DeepSpeed engine; does not import DeepSpeed."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


class DeepSpeedBackend(WholeWeights):
    """A network in a DeepSpeed engine, ZeRO stages 0 to 2; see ``Backend`` for its other members.

    Attributes:
        model: the engine.
        stage: the stage of ZeRO.
        wrapper: the engine's optimizer; in stage 0 it may be a torch optimizer.
    """

    has_one_copy = False  # nor in stage 3, which keeps small parameters whole on every rank
    averages = True
    finds_unused = False  # DeepSpeed reduces missing gradients as zeros
    keeps_hooks = False
    rebuilds_buckets = False

    def __init__(self, model: Any) -> None:
        require_known(model)
        self.model = model
        self.called: nn.Module = model.module
        self.network: nn.Module = not_compiled(model.module)
        self.stage = int(model.zero_optimization_stage())
        self.wrapper = model.optimizer
        self.process_group: dist.ProcessGroup = model.seq_data_parallel_group
        self.comm: Communicator = ProcessGroupComm(self.process_group, model.device)
        self._view = self._view_of_wrapper()
        self.averaged: frozenset[Tensor] = frozenset(self._view.parameters)

    def _view_of_wrapper(self) -> OptimizerView:
        if isinstance(self.wrapper, Optimizer):
            return OptimizerView(self.wrapper)
        if self.stage == 0:
            return CopyingOptimizerView(self.wrapper)
        return PartitionedOptimizerView(self.wrapper)

    @property
    def step_bytes(self) -> int:
        """Bytes of all gradients, and in stages 1 and 2 of this rank's partitions of the weights;
        see ``Backend``."""
        element_size = self.model.communication_data_type.itemsize
        gradients = sum(p.numel() * element_size for p in self.averaged)
        if self.stage == 2:  # reduces in every backward pass
            gradients *= self.model.gradient_accumulation_steps()
        if not self._view.shared or self.comm.size == 1:
            return int(gradients)
        weights = sum(flat.nbytes // self.comm.size for flat in self.wrapper.bit16_groups_flat)
        return int(gradients + weights)

    def reduces_at_once(self, truncation: TruncationConfig) -> bool:
        """Always, so that bytes are counted in the same way in every phase."""
        return True

    def make_reducer(self, truncation: TruncationConfig) -> Reducer:
        """Patch the engine's reduction points; see ``Backend``."""
        return DeepSpeedReducer(self.model, self.stage, partition_shards)

    def optimizer_view(self, optimizer: Optimizer | None) -> OptimizerView:
        """The view of the engine's optimizer.

        Raises:
            ConfigError: ``optimizer`` is a different one.
        """
        if optimizer not in (None, self.wrapper, self._view.optimizer):
            raise ConfigError(
                "attach: this is not the DeepSpeed engine's optimizer; leave it out, or give the "
                "one that deepspeed.initialize returned"
            )
        return self._view

    def user_optimizer(self, view: OptimizerView) -> Optimizer:
        """DeepSpeed's wrapper, which has an optimizer's methods, or the torch optimizer itself."""
        optimizer: Optimizer = self.wrapper
        return optimizer

    def require_fit(self, truncation: TruncationConfig) -> None:
        """Refuse settings that hard truncation does not support under DeepSpeed.

        Raises:
            BackendError: naming the first one.
        """
        if truncation.mode == "hard" and truncation.frozen_weights == "free":
            raise BackendError(
                "attach: truncation.frozen_weights 'free' is not supported under DeepSpeed, whose "
                "optimizers keep gradients in buffers of their own; choose remove or hold"
            )
        if truncation.compression != "none":
            raise BackendError(
                f"attach: truncation.compression {truncation.compression!r} is not supported under "
                "DeepSpeed; set communication_data_type in its own config"
            )
        clipping = float(self.model.gradient_clipping())
        if self.comm.rank == 0:
            logger.info(
                "DeepSpeed clips gradients to norm %g%s; the norm counts live elements",
                clipping,
                " (its default: write gradient_clipping into its config to choose)"
                if "gradient_clipping" not in _settings(self.model)
                else "",
            )

    def release(self) -> None:
        """Remove the engine's hooks from its network before the network is pruned."""
        engine = self.model
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            hook.remove()
        engine.destroy()

    def retire(self) -> None:
        """Make the stale engine refuse to train.

        User code may hold references to it and its optimizer for the rest of the training; they
        must not keep the dense network and its master weights in memory.
        """
        engine, optimizer = self.model, self._view.optimizer
        engine.optimizer = None
        engine.param_names = {}
        engine.register_forward_pre_hook(_refuse)
        if self.wrapper is not optimizer:
            vars(self.wrapper).clear()
            self.wrapper.optimizer = optimizer  # learning rates can still be read
            self.wrapper.step = self.wrapper.zero_grad = _refuse
        gc.collect()  # engines are in reference cycles, with all their buffers

    def revive(self) -> nn.Module:
        """The same engine, with its gradient hooks registered again; see ``Backend``."""
        if self.stage:
            self.wrapper._grad_acc_hooks = []
            self.wrapper.create_gradient_handling_hooks()
        model: nn.Module = self.model
        return model

    def rewrap(self) -> nn.Module:
        """Wrap the network as it is now in a new engine with the same settings and torch optimizer.

        Counters, schedule, monitor and loader are taken from the old engine, so their sections of
        the settings are left out.

        Collective: DeepSpeed broadcasts weights, or waits for all ranks, while it builds an engine.
        The settings are those of an engine that exists, and the network is agreed on, so all that
        can fail on one rank alone is an allocation.  The other ranks then wait in a collective of
        DeepSpeed's, and this one, which has logged the reason, until they come.  ``train`` ends
        that after ``distributed.timeout_seconds``, naming the ranks; in other loops it is the
        timeout of DeepSpeed's process group, torch's default.
        """
        import deepspeed

        old, optimizer = self.model, self._view.optimizer
        settings = copy.deepcopy(_settings(old))
        for section in ("scheduler", *_MONITORS):
            settings.pop(section, None)
        for name in _BATCH_SIZES:  # may have been changed since
            settings[name] = getattr(old, name)()
        with only_these_train(self.network, self._averaged_now()):
            model, *_ = deepspeed.initialize(
                model=self.called, optimizer=optimizer, config=settings, dist_init_required=False
            )
        for name in _CARRIED:
            setattr(model, name, getattr(old, name))
        rewrapped: nn.Module = model
        return rewrapped

    def _averaged_now(self) -> Collection[Tensor]:
        """Those parameters of the network as it is now whose gradients are averaged."""
        return self.averaged


def _settings(engine: Any) -> dict[str, Any]:
    settings: dict[str, Any] = engine._config._param_dict
    return settings


def _refuse(*arguments: Any, **keywords: Any) -> None:
    raise BackendError(
        "stale wrapper: this DeepSpeed engine or optimizer belongs to the network before the draw; "
        "continue with engine.model and engine.optimizer"
    )
