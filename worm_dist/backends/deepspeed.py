"""Zero: DeepSpeed's engine, ZeRO stages 0 to 2, as something to attach to and to build anew.

Its reduction points are not a public interface, so only versions that are known are accepted, and
what has not been proved exact is refused with its name.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..config import TruncationConfig
from ..distributed.collectives import Communicator, ProcessGroupComm
from ..errors import BackendError, ConfigError
from .deepspeed_optimizer import CopyingOptimizerView, PartitionedOptimizerView
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
"""What of an engine goes on in the one that is built anew."""

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
    """A network in DeepSpeed's engine.

    Attributes:
        model: the engine.
        called: what it calls: the network, or what torch.compile made of it.
        network: the network itself.
        averaged: the parameters whose gradients are reduced.
        finds_unused: never: DeepSpeed reduces what has no gradient as zeros.
        stage: of ZeRO.
        wrapper: the engine's optimizer, in stage 0 perhaps a torch optimizer.
        process_group: that gradients are reduced in.
    """

    finds_unused = False
    keeps_hooks = False

    def __init__(self, model: Any) -> None:
        _require_known(model)
        self.model = model
        self.called: nn.Module = model.module
        self.network: nn.Module = getattr(model.module, "_orig_mod", model.module)
        self.stage = int(model.zero_optimization_stage())
        self.wrapper = model.optimizer
        self.process_group: dist.ProcessGroup = model.seq_data_parallel_group
        self.ranks: Communicator = ProcessGroupComm(self.process_group, model.device)
        self._stepping: OptimizerView = (
            OptimizerView(self.wrapper)
            if isinstance(self.wrapper, Optimizer)
            else CopyingOptimizerView(self.wrapper)
            if self.stage == 0
            else PartitionedOptimizerView(self.wrapper)
        )
        self.averaged = frozenset(self._stepping.parameters)

    @property
    def step_bytes(self) -> int:
        """What a dense step hands to collectives: gradients, and in stages 1 and 2 this rank's
        partitions of the weights."""
        sent = self.model.communication_data_type.itemsize
        gradients = sum(p.numel() * sent for p in self.averaged)
        if self.stage == 2:  # reduces in every pass
            gradients *= self.model.gradient_accumulation_steps()
        if not self._stepping.shared or self.ranks.size == 1:
            return int(gradients)
        weights = sum(flat.nbytes // self.ranks.size for flat in self.wrapper.bit16_groups_flat)
        return int(gradients + weights)

    def stepping_of(self, optimizer: Optimizer | None) -> OptimizerView:
        """How the engine's optimizer steps.

        Raises:
            ConfigError: another optimizer is given.
        """
        if optimizer not in (None, self.wrapper, self._stepping.optimizer):
            raise ConfigError(
                "attach: this is not the DeepSpeed engine's optimizer; leave it out, or give the "
                "one that deepspeed.initialize returned"
            )
        return self._stepping

    def optimizer_of(self, stepping: OptimizerView) -> Optimizer:
        """DeepSpeed's wrapper, which has an optimizer's methods, or the torch optimizer itself."""
        optimizer: Optimizer = self.wrapper
        return optimizer

    def require_fit(self, truncation: TruncationConfig) -> None:
        """Settings that hard truncation cannot keep here.

        Raises:
            BackendError: naming the first one.
        """
        if truncation.mode == "hard" and truncation.frozen_weights == "free":
            raise BackendError(
                "attach: truncation.frozen_weights 'free' is not there for DeepSpeed, whose "
                "optimizers keep gradients elsewhere; choose remove or hold"
            )
        if truncation.compression != "none":
            raise BackendError(
                f"attach: truncation.compression {truncation.compression!r} is not there for "
                "DeepSpeed; set communication_data_type in its own config"
            )
        clipping = float(self.model.gradient_clipping())
        if self.ranks.rank == 0:
            logger.info(
                "DeepSpeed clips gradients to norm %g%s; the norm counts live elements",
                clipping,
                " (its default: write gradient_clipping into its config to choose)"
                if "gradient_clipping" not in _settings(self.model)
                else "",
            )

    def release(self) -> None:
        """Take the engine's hooks off its network before that is cut."""
        engine = self.model
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            hook.remove()
        engine.destroy()

    def retire(self) -> None:
        """The engine is dead.

        Variables of the user's may keep it and its optimizer for as long as they train; the dense
        network and its master weights must not stay in memory with them.
        """
        engine, optimizer = self.model, self._stepping.optimizer
        engine.optimizer = None
        engine.param_names = {}
        engine.register_forward_pre_hook(_refuse)
        if self.wrapper is not optimizer:
            vars(self.wrapper).clear()
            self.wrapper.optimizer = optimizer  # learning rates can still be read
            self.wrapper.step = self.wrapper.zero_grad = _refuse
        gc.collect()  # engines hold themselves in circles, with all their buffers

    def revive(self) -> nn.Module:
        """The engine, whose network and torch optimizer are again as they were, hooks and all."""
        if self.stage:
            self.wrapper._grad_acc_hooks = []
            self.wrapper.create_gradient_handling_hooks()
        model: nn.Module = self.model
        return model

    def wrapped_again(self) -> nn.Module:
        """The network as it is now in a new engine with the same settings and torch optimizer.

        Counters, schedule, monitor and loader are those of the old engine; so nothing is made again
        of what the settings say of them.
        """
        import deepspeed

        old, optimizer = self.model, self._stepping.optimizer
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
        again: nn.Module = model
        return again


def _require_known(engine: Any) -> None:
    """Only what was seen to be exact.

    Raises:
        BackendError: naming what is not.
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
            "ZeRO stage 3 partitions the weights themselves, which are scored, held and cut whole "
            "here; choose stage 0, 1 or 2"
        )
    if engine.pipeline_parallelism:
        yield "pipeline parallelism cuts the network into stages; masks are of the whole network"
    if engine.has_moe_layers:
        yield "experts (MoE) are reduced in groups of their own; train without them"
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
            "DeepSpeed puts an Adagrad of its own in the place of the one that it is given; choose "
            "another optimizer, or stage 0"
        )
    elif stage in (1, 2) and "muon" in type(basic).__name__.lower():
        yield (
            f"{type(basic).__name__} makes one step of a whole matrix, whose parts cannot be "
            "frozen or cut apart; choose another optimizer"
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
    """A function that we replace must be the one we know, whatever the version says."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage_1_and_2

    optimizer = stage_1_and_2.DeepSpeedZeroOptimizer
    owners = {"stage_1_and_2": stage_1_and_2}
    owners |= {kind.__name__: kind for kind in (DeepSpeedEngine, optimizer)}
    for point, known in _REDUCTION_POINTS.items():
        owner, name = point.split(".")
        function = getattr(owners[owner], name, None)
        if function is None or list(inspect.signature(function).parameters) != known:
            yield f"{point} is not the one we know; install deepspeed>=0.19,<0.20"


def _settings(engine: Any) -> dict[str, Any]:
    settings: dict[str, Any] = engine._config._param_dict
    return settings


def _refuse(*arguments: Any, **keywords: Any) -> None:
    raise BackendError(
        "this engine or optimizer belongs to the network before the draw; go on with engine.model "
        "and engine.optimizer"
    )
