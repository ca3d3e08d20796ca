"""DeepSpeed: a network in a DeepSpeed engine, ZeRO stages 0 to 2.

Its reduction points are not a public interface, so only known versions are accepted, and features
that have not been verified to be exact are refused by name.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
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
from .optimizer_view import OptimizerView
from .sparse_weights import sparse_weights
from .trained_parameters import only_these_train

__all__ = ["DeepSpeedBackend", "is_deepspeed"]

logger = logging.getLogger(__name__)

_KNOWN_VERSIONS = ("0.19.",)
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

_REDUCTION_POINTS = {
    "DeepSpeedEngine.allreduce_and_copy": ["self", "small_bucket", "dp_group", "dp_world_size"],
    "DeepSpeedZeroOptimizer.average_tensor": ["self", "tensor", "communication_data_type"],
    "DeepSpeedZeroOptimizer.gradient_reduction_w_predivide": [
        "self",
        "tensor",
        "communication_data_type",
    ],
    "DeepSpeedZeroOptimizer.allreduce_bucket": [
        "self",
        "bucket",
        "communication_data_type",
        "rank",
        "log",
        "divide",
        "process_group",
    ],
    "stage_1_and_2.all_gather_dp_groups": [
        "groups_flat",
        "partitioned_param_groups",
        "dp_process_group",
        "start_alignment_factor",
        "allgather_bucket_size",
    ],
}


def is_deepspeed(model: nn.Module) -> bool:
    """Whether a model is a DeepSpeed engine; does not import DeepSpeed."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


class DeepSpeedBackend:
    """A network in a DeepSpeed engine, ZeRO stages 0 to 2; see ``Backend`` for its other members.

    Attributes:
        model: the engine.
        stage: the stage of ZeRO.
        wrapper: the engine's optimizer; in stage 0 it may be a torch optimizer.
    """

    shards_weights = False
    averages = True
    finds_unused = False  # DeepSpeed reduces missing gradients as zeros
    keeps_hooks = False
    rebuilds_buckets = False

    def __init__(self, model: Any) -> None:
        _require_known(model)
        self.model = model
        self.called: nn.Module = model.module
        self.network: nn.Module = not_compiled(model.module)
        self.stage = int(model.zero_optimization_stage())
        self.wrapper = model.optimizer
        self.process_group: dist.ProcessGroup = model.seq_data_parallel_group
        self.comm: Communicator = ProcessGroupComm(self.process_group, model.device)
        self._view: OptimizerView = (
            OptimizerView(self.wrapper)
            if isinstance(self.wrapper, Optimizer)
            else CopyingOptimizerView(self.wrapper)
            if self.stage == 0
            else PartitionedOptimizerView(self.wrapper)
        )
        self.averaged: frozenset[Tensor] = frozenset(self._view.parameters)

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

    def full_network(self) -> AbstractContextManager[nn.Module]:
        """The network itself; see ``Backend``."""
        return nullcontext(self.network)

    def full_values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parameters' own values; see ``Backend``."""
        return [parameter.detach() for parameter in parameters]

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
        """
        import deepspeed

        old, optimizer = self.model, self._view.optimizer
        settings = copy.deepcopy(_settings(old))
        for section in ("scheduler", *_MONITORS):
            settings.pop(section, None)
        for name in _BATCH_SIZES:  # may have been changed since
            settings[name] = getattr(old, name)()
        with only_these_train(self.network, self.averaged):
            model, *_ = deepspeed.initialize(
                model=self.called, optimizer=optimizer, config=settings, dist_init_required=False
            )
        for name in _CARRIED:
            setattr(model, name, getattr(old, name))
        rewrapped: nn.Module = model
        return rewrapped


def _require_known(engine: Any) -> None:
    """Refuse engines with features that have not been verified to be exact.

    Raises:
        BackendError: naming the feature.
    """
    for reason in _refusals(engine):
        raise BackendError(f"attach: DeepSpeed: {reason}")


def _refusals(engine: Any) -> Iterator[str]:
    import deepspeed

    version = deepspeed.__version__
    if not version.startswith(_KNOWN_VERSIONS):
        yield (
            f"version {version} is not known; its reduction points are known for "
            f"{', '.join(f'{known}x' for known in _KNOWN_VERSIONS)}"
        )
    yield from _changed_points()
    stage, zero = int(engine.zero_optimization_stage()), engine._config.zero_config
    if engine.optimizer is None:
        yield "the engine has no optimizer; give deepspeed.initialize one"
    if stage == 3:
        yield (
            "ZeRO stage 3 partitions the weights themselves, and here every rank scores, holds and "
            "prunes full weights; choose stage 0, 1 or 2"
        )
    if engine.pipeline_parallelism:
        yield "pipeline parallelism splits the network into stages; masks span the whole network"
    if engine.has_moe_layers:
        yield "experts (MoE) are reduced in process groups of their own; train without them"
    if engine.mpu is not None or engine.autotp_size() > 1:
        yield "tensor parallelism spreads a channel over ranks; train with data parallelism alone"
    if engine.sequence_parallel_size > 1:
        yield "sequence parallelism reduces in a precision of its own; train without it"
    if engine.fp16_enabled():
        yield "fp16 with its loss scale has not been proved exact; choose bf16 or fp32"
    if zero.offload_optimizer is not None and zero.offload_optimizer.device != "none":
        yield "optimizer offload keeps gradients on the CPU, past the reduction points; turn it off"
    if zero.offload_param is not None and zero.offload_param.device != "none":
        yield "parameter offload moves the weights away; turn it off"
    if any(parameter.is_complex() for parameter in engine.module.parameters()):
        yield "complex parameters have not been proved exact; use DistributedDataParallel"
    if sparse_weights(engine.module):
        yield "sparse gradients are reduced by another path; make embeddings with sparse=False"
    if zero.zero_quantized_gradients:
        yield "quantized gradients have another reduction; turn zero_quantized_gradients off"
    if stage in (1, 2) and not zero.contiguous_gradients:
        yield "contiguous_gradients false takes another path to the reduction; leave it true"
    if engine.torch_autocast_enabled():
        yield "torch_autocast reduces in several precisions; choose bf16 or fp32"
    yield from _optimizer_refusals(engine, stage)


def _optimizer_refusals(engine: Any, stage: int) -> Iterator[str]:
    wrapper = engine.optimizer
    basic = getattr(wrapper, "optimizer", wrapper)
    kind = type(wrapper).__name__
    known = {0: "FP16_UnfusedOptimizer", 1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer"}
    if ".onebit." in type(basic).__module__:
        yield f"{type(basic).__name__} compresses and averages by itself; choose another optimizer"
    elif stage in (1, 2) and isinstance(basic, torch.optim.Adagrad):
        yield (
            "DeepSpeed replaces a given Adagrad by its own; choose another optimizer, or stage 0"
        )
    elif stage in (1, 2) and "muon" in type(basic).__name__.lower():
        yield (
            f"{type(basic).__name__} updates a whole matrix jointly, so that single channels "
            "cannot be frozen or pruned; choose another optimizer"
        )
    elif kind == "BF16_Optimizer":
        yield (
            "BF16_Optimizer (bf16 with gradients accumulated in fp32, stage 1) has other reduction "
            "points; set data_types.grad_accum_dtype to bf16, or choose stage 2"
        )
    elif stage == 0 and isinstance(wrapper, Optimizer):
        pass
    elif wrapper is not None and kind != known.get(stage, kind):
        yield f"the optimizer {kind} is not known in stage {stage}; choose a torch optimizer"
    elif stage in (1, 2) and any(
        p.dtype != torch.float32 for p in wrapper.single_partition_of_fp32_groups
    ):
        yield "master weights that are not fp32 have not been proved exact; keep them in fp32"


def _changed_points() -> Iterator[str]:
    """Patched functions whose signature is not the known one, whatever the version number."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage_1_and_2

    optimizer = stage_1_and_2.DeepSpeedZeroOptimizer
    owners = {"stage_1_and_2": stage_1_and_2}
    owners |= {kind.__name__: kind for kind in (DeepSpeedEngine, optimizer)}
    for point, known in _REDUCTION_POINTS.items():
        owner, name = point.split(".")
        function = getattr(owners[owner], name, None)
        if function is None or list(inspect.signature(function).parameters) != known:
            yield f"{point} has an unknown signature; install deepspeed>=0.19,<0.20"


def _settings(engine: Any) -> dict[str, Any]:
    settings: dict[str, Any] = engine._config._param_dict
    return settings


def _refuse(*arguments: Any, **keywords: Any) -> None:
    raise BackendError(
        "stale wrapper: this DeepSpeed engine or optimizer belongs to the network before the draw; "
        "continue with engine.model and engine.optimizer"
    )
