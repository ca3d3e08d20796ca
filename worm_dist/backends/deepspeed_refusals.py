"""DeepSpeed refusals: engines with features that have not been verified to be exact.

Reduction points are not a public interface, so only known versions are accepted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import BackendError
from .sparse_weights import sparse_weights

__all__ = ["require_known"]

_KNOWN_VERSIONS = ("0.19.",)

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
    "DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads": [
        "self",
        "params_to_reduce",
        "communication_data_type",
    ],
    "stage3.reduce_scatter_coalesced": ["tensors", "group"],
}


def require_known(engine: Any) -> None:
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
    if stage == 3:
        yield from _refusals_of_stage_3(engine, zero)
    yield from _optimizer_refusals(engine, stage)


def _refusals_of_stage_3(engine: Any, zero: Any) -> Iterator[str]:
    if not zero.reduce_scatter:
        yield "reduce_scatter false takes another path to the reduction; leave it true"
    if zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights:
        yield (
            "quantized weights share scales between channels; turn zero_quantized_weights and "
            "zero_quantized_nontrainable_weights off"
        )
    if zero.use_all_reduce_for_fetch_params:
        yield "use_all_reduce_for_fetch_params gathers weights by sums; turn it off"
    if zero.zero_hpz_partition_size > 1:
        yield (
            "zero_hpz_partition_size keeps second copies of the weights, in which channels would "
            "not be held; set it to 1"
        )
    if zero.zenflow is not None:
        yield "zenflow steps some channels on their own; turn it off"
    if getattr(engine.optimizer, "all2all_process_group", None) is not None:
        yield "all-to-all is another reduction of the gradients; turn it off"
    if engine.is_deepcompile_enabled():
        yield "deepcompile moves the gathers of weights into compiled graphs; turn compile off"


def _optimizer_refusals(engine: Any, stage: int) -> Iterator[str]:
    wrapper = engine.optimizer
    basic = getattr(wrapper, "optimizer", wrapper)
    kind = type(wrapper).__name__
    known = {
        0: "FP16_UnfusedOptimizer",
        1: "DeepSpeedZeroOptimizer",
        2: "DeepSpeedZeroOptimizer",
        3: "DeepSpeedZeroOptimizer_Stage3",
    }
    if ".onebit." in type(basic).__module__:
        yield f"{type(basic).__name__} compresses and averages by itself; choose another optimizer"
    elif stage > 0 and isinstance(basic, torch.optim.Adagrad):
        yield (
            "DeepSpeed replaces a given Adagrad by its own; choose another optimizer, or stage 0"
        )
    elif stage > 0 and "muon" in type(basic).__name__.lower():
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
    elif stage > 0 and any(
        p.dtype != torch.float32
        for p in (
            wrapper.fp32_partitioned_groups_flat
            if stage == 3
            else wrapper.single_partition_of_fp32_groups
        )
    ):
        yield "master weights that are not fp32 have not been proved exact; keep them in fp32"


def _changed_points() -> Iterator[str]:
    """Patched functions whose signature is not the known one, whatever the version number."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    optimizers = stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3
    owners = {"stage_1_and_2": stage_1_and_2, "stage3": stage3}
    owners |= {kind.__name__: kind for kind in (DeepSpeedEngine, *optimizers)}
    for point, known in _REDUCTION_POINTS.items():
        owner, name = point.split(".")
        function = getattr(owners[owner], name, None)
        if function is None or _argument_names(function) != known:
            yield f"{point} has an unknown signature; install deepspeed>=0.19,<0.20"


def _argument_names(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments, also if DeepSpeed has wrapped it to measure its time."""
    names = list(inspect.signature(function).parameters)
    if names == ["args", "kwargs"]:
        wrapped = inspect.getclosurevars(function).nonlocals.get("func")
        return names if wrapped is None else _argument_names(wrapped)
    return names
