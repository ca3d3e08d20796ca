"""DDP: a network in torch's DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..comm_hooks.allreduce import AllReduce, Averager
from ..comm_hooks.checksums import Checksums
from ..comm_hooks.ddp_hook import PackedReducer, packed_allreduce
from ..comm_hooks.powersgd import PowerSGD
from ..comm_hooks.reducer import Reducer
from ..config import TruncationConfig
from ..distributed.collectives import Communicator, ProcessGroupComm
from ..errors import BackendError
from .backend import not_compiled
from .optimizer_view import OptimizerView
from .optimizers import innermost
from .sparse_weights import sparse_weights
from .trained_parameters import only_these_train
from .whole_weights import WholeWeights

__all__ = ["DdpBackend"]

_WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DdpBackend(WholeWeights):
    """A network in torch's DistributedDataParallel; see ``Backend`` for its other members.

    Attributes:
        model: the wrapper.
    """

    has_one_copy = False
    averages = True
    keeps_hooks = True  # torch cannot unregister a communication hook; only a new wrapper has none
    rebuilds_buckets = True

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model = model
        self.called: nn.Module = model.module
        self.network = not_compiled(self.called)
        self.finds_unused: bool = model.find_unused_parameters
        self.process_group: dist.ProcessGroup = model.process_group
        self.comm: Communicator = ProcessGroupComm(self.process_group, model.device)
        self.averaged: frozenset[Tensor] = _averaged(model)

    @property
    def step_bytes(self) -> int:
        """Bytes of all averaged gradients."""
        return sum(p.numel() * p.element_size() for p in self.averaged)

    def reduces_at_once(self, truncation: TruncationConfig) -> bool:
        """Whether gradients are compressed; otherwise DDP's own reduction does."""
        return truncation.compression != "none"

    def make_reducer(self, truncation: TruncationConfig) -> Reducer:
        """Register the communication hook; see ``Backend``."""
        averager: Averager
        checksums: Checksums | None = None
        if truncation.compression == "powersgd":
            averager = PowerSGD(self.process_group, truncation.compression_rank)
        else:
            if truncation.checksums and self.comm.size > 1:
                checksums = Checksums(self.comm.size)
            dtype = _WIRE_DTYPES.get(truncation.compression)
            averager = AllReduce(self.process_group, dtype, checksums)
        reducer = PackedReducer(averager, self.process_group, checksums)
        self.model.register_comm_hook(reducer, packed_allreduce)
        return reducer

    def optimizer_view(self, optimizer: Optimizer | None) -> OptimizerView:
        """See ``Backend``."""
        return OptimizerView(innermost(optimizer))

    def user_optimizer(self, view: OptimizerView) -> Optimizer:
        """See ``Backend``."""
        return view.optimizer

    def release(self) -> None:
        """Remove DDP's autograd hooks.  Parameters that keep their shape keep their autograd nodes,
        on which the old and the new reducer would both run."""
        self.model._remove_autograd_hooks()

    def require_fit(self, truncation: TruncationConfig) -> None:
        """Check the user's communication hook: DDP allows one, and it is never replaced.

        Raises:
            BackendError: hard truncation needs the hook's place but one is registered, its state
                would not fit the network after a draw, or PowerSGD does not support a parameter.
        """
        for hook, state in self.model._comm_hooks:
            name = getattr(hook, "__qualname__", repr(hook))
            if truncation.mode == "hard":
                raise BackendError(
                    f"attach: the model already has the communication hook {name}, and "
                    "DDP allows only one, which truncation.mode 'hard' needs; attach to a model "
                    "without one (truncation.compression has bf16, fp16 and powersgd)"
                )
            if not (state is None or isinstance(state, dist.ProcessGroup)):
                raise BackendError(
                    f"attach: the communication hook {name} keeps a state "
                    f"({type(state).__name__}) that would not fit the network after a draw"
                )
        if truncation.compression == "powersgd":
            self._require_powersgd()

    def _require_powersgd(self) -> None:
        sparse = sparse_weights(self.network)
        for name, parameter in self.network.named_parameters():
            if parameter in self.averaged and (parameter.is_complex() or parameter in sparse):
                kind = "complex numbers" if parameter.is_complex() else "sparse gradients"
                raise BackendError(
                    f"attach: parameter {name} has {kind}, which PowerSGD does not support; choose "
                    "truncation.compression 'none' or 'bf16'"
                )

    def rewrap(self) -> nn.Module:
        """Wrap the network as it is now with the same arguments, and with the user's communication
        hook if there is one; see ``Backend``."""
        return self._wrapped(lambda state: not isinstance(state, Reducer))

    def retire(self) -> None:
        """Make the stale wrapper refuse to train; a user's reference to it must not keep its
        buckets in memory."""
        self.model.register_forward_pre_hook(_refuse)
        self.model.reducer = None  # type: ignore[assignment]
        self.model.logger = None

    def revive(self) -> nn.Module:
        """Wrap the rolled-back network anew with all communication hooks; retire the old
        wrapper."""
        model = self._wrapped(lambda state: True)
        self.retire()
        return model

    def _wrapped(self, keeps: Callable[[object], bool]) -> DistributedDataParallel:
        """A new wrapper that averages the same parameters, whichever require gradients now.

        Args:
            keeps: whether a communication hook with this state is registered again.
        """
        with only_these_train(self.network, self.averaged):
            model = DistributedDataParallel(self.called, **_arguments(self.model))
        for hook, state in self.model._comm_hooks:
            if keeps(state):
                model.register_comm_hook(state, hook)
        return model


def _refuse(model: nn.Module, args: Any) -> None:
    raise BackendError(
        "stale wrapper: this DistributedDataParallel wrapped the network before the draw and no "
        "longer averages gradients; call engine.model instead"
    )


def _averaged(model: DistributedDataParallel) -> frozenset[Tensor]:
    """The parameters that DDP's reducer was built for, read from its buckets."""
    if sparse_weights(model.module):  # their buckets are empty before the first pass
        return frozenset(p for p in model._module_parameters if p.requires_grad)
    buckets = model.reducer._get_zeros_like_grad_buckets()
    return frozenset(parameter for bucket in buckets for parameter in bucket.parameters())


def _arguments(model: DistributedDataParallel) -> dict[str, Any]:
    """The arguments of the wrapper's constructor; torch keeps most of them as attributes."""
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
    # torch 2.14 renamed the argument and warns about the old name.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    arguments[buffers] = getattr(model, buffers)
    if not getattr(model, "bucket_bytes_cap_default", False):
        arguments["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20
    if "init_sync" in known:
        arguments["init_sync"] = False
    return arguments
