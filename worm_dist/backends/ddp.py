"""Wrap: from what the user trains to the bare network, and back after a draw."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.contract import _get_registry
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..config import TruncationConfig
from ..distributed.collectives import Communicator, ProcessGroupComm, SingleProcessComm
from ..errors import BackendError
from .deepspeed import DeepSpeedBackend, is_deepspeed
from .optimizer_view import OptimizerView
from .optimizers import innermost
from .sparse_weights import sparse_weights
from .trained_parameters import only_these_train

__all__ = ["Backend", "DdpBackend", "OwnHookState", "SingleProcess", "backend_of"]


_OTHER_WAYS = {
    "DataParallel": "nn.DataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel (FSDP)",
    "FSDPModule": "fully_shard (FSDP2)",
    "fully_shard": "fully_shard (FSDP2)",
    "replicate": "replicate()",
}
"""Classes of modules, and contracts by which torch's functions mark them, with their names."""


class SingleProcess:
    """Not wrapped at all: one process.

    Attributes:
        called: what the user calls: the network, or what torch.compile made of it.
        network: the network itself.
        finds_unused: a forward pass may leave parameters out, and is searched for them.
    """

    finds_unused = False

    def __init__(self, called: nn.Module) -> None:
        self.called = called
        self.network = _not_compiled(called)
        self.ranks: Communicator = SingleProcessComm()

    process_group = None
    step_bytes = 0
    keeps_hooks = False

    @property
    def averaged(self) -> frozenset[Tensor]:
        """The parameters whose gradients are sent: none here; those that may train."""
        return frozenset(self.network.parameters())

    def require_fit(self, truncation: TruncationConfig) -> None:
        """Nothing to ask: no gradients are sent."""

    def stepping_of(self, optimizer: Optimizer | None) -> OptimizerView:
        """How this optimizer steps."""
        return OptimizerView(innermost(optimizer))

    def optimizer_of(self, stepping: OptimizerView) -> Optimizer:
        """What the user steps."""
        return stepping.optimizer

    def release(self) -> None:
        """Nothing holds the network."""

    def wrapped_again(self) -> nn.Module:
        """The network as it is now, ready for training."""
        return self.called

    def retire(self) -> None:
        """Nothing is left behind."""

    def revive(self) -> nn.Module:
        """The network, which is again as it was."""
        return self.called


class DdpBackend:
    """torch's DistributedDataParallel.

    Attributes:
        model: the wrapper.
        called: what it calls: the network, or what torch.compile made of it.
        network: the network itself.
        averaged: the parameters whose gradients are averaged.
        finds_unused: a forward pass may leave parameters out, and is searched for them.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model = model
        self.called: nn.Module = model.module
        self.network = _not_compiled(self.called)
        self.finds_unused: bool = model.find_unused_parameters
        self.process_group: dist.ProcessGroup = model.process_group
        self.ranks: Communicator = ProcessGroupComm(self.process_group, model.device)
        self.averaged = _averaged(model)

    keeps_hooks = True
    """torch cannot unregister a communication hook; only a new wrapper is rid of it."""

    @property
    def step_bytes(self) -> int:
        """What a dense step hands to the all-reduce."""
        return sum(p.numel() * p.element_size() for p in self.averaged)

    def stepping_of(self, optimizer: Optimizer | None) -> OptimizerView:
        """How this optimizer steps.

        Raises:
            ConfigError, BackendError: there is none, or its steps and state cannot be seen.
        """
        return OptimizerView(innermost(optimizer))

    def optimizer_of(self, stepping: OptimizerView) -> Optimizer:
        """What the user steps."""
        return stepping.optimizer

    def release(self) -> None:
        """Gradients are not averaged any more.  Parameters that nothing is cut from keep the nodes
        that two reducers would hear."""
        self.model._remove_autograd_hooks()

    def require_fit(self, truncation: TruncationConfig) -> None:
        """A wrapper has one place for a communication hook; the user's is never replaced.

        Raises:
            BackendError: hard truncation needs the place but it is taken, or taken by a hook whose
                state would not fit the network after a draw.
        """
        for hook, state in self.model._comm_hooks:
            name = getattr(hook, "__qualname__", repr(hook))
            if truncation.mode == "hard":
                raise BackendError(
                    f"attach: the model already has the communication hook {name}, and "
                    "truncation.mode 'hard' needs its place; attach to a model without one "
                    "(truncation.compression has bf16, fp16 and powersgd)"
                )
            if not (state is None or isinstance(state, dist.ProcessGroup)):
                raise BackendError(
                    f"attach: the communication hook {name} keeps a state "
                    f"({type(state).__name__}) that would not fit the network after a draw"
                )
        if truncation.compression == "powersgd":
            self._require_low_rank()

    def _require_low_rank(self) -> None:
        sparse = sparse_weights(self.network)
        for name, parameter in self.network.named_parameters():
            if parameter in self.averaged and (parameter.is_complex() or parameter in sparse):
                kind = "complex numbers" if parameter.is_complex() else "sparse gradients"
                raise BackendError(
                    f"attach: parameter {name} has {kind}, of which PowerSGD knows nothing; choose "
                    "truncation.compression 'none' or 'bf16'"
                )

    def wrapped_again(self) -> nn.Module:
        """The network as it is now in a new wrapper with the same arguments, and with the user's
        communication hook if there is one."""
        return self._wrapped(lambda state: not isinstance(state, OwnHookState))

    def retire(self) -> None:
        """The wrapper is dead; a variable of the user's may keep it, but not its buckets."""
        self.model.register_forward_pre_hook(_refuse)
        self.model.reducer = None  # type: ignore[assignment]
        self.model.logger = None

    def revive(self) -> nn.Module:
        """The network, which is again as it was, in a new wrapper with all communication hooks of
        the old one; that one is dead."""
        model = self._wrapped(lambda state: True)
        self.retire()
        return model

    def _wrapped(self, keeps: Callable[[object], bool]) -> DistributedDataParallel:
        """In a new wrapper, which averages what this one does, whatever trains at the moment.  No
        collective: the ranks hold the same network and prove it elsewhere."""
        with only_these_train(self.network, self.averaged):
            model = DistributedDataParallel(self.called, **_arguments(self.model))
        for hook, state in self.model._comm_hooks:
            if keeps(state):
                model.register_comm_hook(state, hook)
        return model


Backend: TypeAlias = SingleProcess | DdpBackend | DeepSpeedBackend


def backend_of(model: nn.Module) -> Backend:
    """Recognise how a model is wrapped.

    Raises:
        BackendError: several processes, but the model is not wrapped for them; a wrapper that is
            compiled itself; a DeepSpeed engine that is not one we know.
    """
    if is_deepspeed(model):
        return DeepSpeedBackend(model)
    _require_whole(model)
    if isinstance(model, DistributedDataParallel):
        return DdpBackend(model)
    if isinstance(_not_compiled(model), DistributedDataParallel):
        raise BackendError(
            "attach: torch.compile around DistributedDataParallel compiles nothing here; compile "
            "the network, then wrap it: DistributedDataParallel(torch.compile(network))"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise BackendError(
            f"attach: {dist.get_world_size()} processes train together, but the model is a bare "
            f"{type(model).__name__}; wrap it in DistributedDataParallel, or give it to "
            "deepspeed.initialize, first"
        )
    return SingleProcess(model)


def _require_whole(model: nn.Module) -> None:
    """Raises:
    BackendError: parallel in a way that is not supported.
    """
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for kind, name in _OTHER_WAYS.items():
            if kind in kinds or kind in (_get_registry(module) or {}):
                raise BackendError(
                    f"attach: the model is parallel by {name}, which is not supported; wrap it in "
                    "DistributedDataParallel, or give it to deepspeed.initialize"
                )
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise BackendError(
            "attach: parameters of the model are DTensors (tensor parallelism, FSDP2), which are "
            "not supported; wrap the whole network in DistributedDataParallel"
        )


class OwnHookState:
    """Marks the state of a communication hook of ours; it ends with its wrapper."""


def _refuse(model: nn.Module, args: Any) -> None:
    raise BackendError(
        "this wrapper belongs to the network before the draw and averages no gradients any more; "
        "call engine.model"
    )


def _averaged(model: DistributedDataParallel) -> frozenset[Tensor]:
    """What its reducer has been built for, which says so only through its buckets."""
    if sparse_weights(model.module):  # whose buckets are empty before the first pass
        return frozenset(p for p in model._module_parameters if p.requires_grad)
    buckets = model.reducer._get_zeros_like_grad_buckets()
    return frozenset(parameter for bucket in buckets for parameter in bucket.parameters())


def _not_compiled(module: nn.Module) -> nn.Module:
    """What torch.compile was given."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def _arguments(model: DistributedDataParallel) -> dict[str, Any]:
    """The arguments that the wrapper was made with; torch keeps most of them by their own name."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    arguments = {
        name: getattr(model, name)
        for name in (
            "device_ids",
            "output_device",
            "dim",
            "process_group",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
            "mixed_precision",
            "skip_all_reduce_unused_params",
            "batched_grad_copy",
        )
        if name in known and hasattr(model, name)
    }
    # torch 2.14 renamed the argument, and warns where the old name is used.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    arguments[buffers] = getattr(model, buffers)
    if not getattr(model, "bucket_bytes_cap_default", False):
        arguments["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20
    if "init_sync" in known:
        arguments["init_sync"] = False
    return arguments
