"""Backend: the protocol between the engine and a training wrapper.

A new backend is one class with this protocol, one reducer in ``comm_hooks``, and one line in
``recognition``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..comm_hooks.reducer import Reducer
from ..config import TruncationConfig
from ..distributed.collectives import Communicator
from .optimizer_view import OptimizerView

__all__ = ["Backend", "not_compiled"]


class Backend(Protocol):
    """A network in its wrapper.

    Attributes:
        called: the module that the wrapper calls: the network, or its torch.compile wrapper.
        network: the bare network.
        comm: the communicator of the data-parallel ranks.
        process_group: the process group in which gradients are reduced; None on a single process.
        shards_weights: whether each rank holds only its part of the weights.
        has_one_copy: whether each element of the weights is on one rank alone, so that full weights
            are the same on all ranks.
        averages: whether the wrapper averages gradients over ranks.
        finds_unused: whether the wrapper looks for parameters that a forward pass has not used.
        keeps_hooks: whether a communication hook cannot be unregistered from the wrapper.
        rebuilds_buckets: whether the wrapper rebuilds its buckets after its first backward pass.
    """

    called: nn.Module
    comm: Communicator
    shards_weights: bool
    has_one_copy: bool
    averages: bool
    finds_unused: bool
    keeps_hooks: bool
    rebuilds_buckets: bool

    @property
    def network(self) -> nn.Module: ...

    @property
    def process_group(self) -> dist.ProcessGroup | None: ...

    @property
    def averaged(self) -> frozenset[Tensor]:
        """The parameters whose gradients are averaged; on a single process all parameters."""

    @property
    def step_bytes(self) -> int:
        """Bytes per rank in the collectives of one optimizer step of the unfrozen network."""

    def full_network(self) -> AbstractContextManager[nn.Module]:
        """Context in which ``network`` is a plain module with full weights, to be run and copied.

        The module and its buffers are the network's own, so statistics written to them stay.  Its
        parameters are the network's own only where every rank holds full weights; where they are
        sharded they are gathered for the context, which takes one copy of the weights (never of the
        optimizer's state) on every rank, and what is written to them is lost.  Collective where
        weights are sharded: the entry is, the exit is not.
        """

    def full_values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The full values of a few small parameters, detached; by one collective where they are
        sharded.

        Args:
            parameters: parameters of the network, the same on every rank.
        """

    def make_available(self, parameters: Sequence[Tensor]) -> None:
        """Let a loss of the pass under way depend on these parameters; collective where weights are
        sharded."""

    def require_fit(self, truncation: TruncationConfig) -> None:
        """Refuse settings that this backend does not support.

        Raises:
            BackendError: naming the first such setting.
        """

    def reduces_at_once(self, truncation: TruncationConfig) -> bool:
        """Whether gradients go through a ``Reducer`` already while no channel is frozen."""

    def make_reducer(self, truncation: TruncationConfig) -> Reducer:
        """A reducer of the wrapper's gradients, which replaces the wrapper's own reduction until
        its ``remove``."""

    def optimizer_view(self, optimizer: Optimizer | None) -> OptimizerView:
        """The view of this optimizer.

        Raises:
            ConfigError, BackendError: there is no optimizer, or its steps or state are not
                accessible.
        """

    def user_optimizer(self, view: OptimizerView) -> Optimizer:
        """The optimizer object that the training loop steps."""

    def release(self) -> None:
        """Remove the wrapper's hooks from the network before the network is pruned; called within
        ``full_network``, whose weights the network keeps."""

    def rewrap(self) -> nn.Module:
        """Wrap the network as it is now in a new wrapper with the old wrapper's arguments.  Not a
        collective, except under DeepSpeed: that the ranks hold the same network is verified
        elsewhere."""

    def retire(self) -> None:
        """Make the stale wrapper refuse to train, and free its buffers; user code may still hold a
        reference to it."""

    def revive(self) -> nn.Module:
        """The wrapper to continue with after a failed draw has been rolled back."""


def not_compiled(module: Any) -> nn.Module:
    """The module inside torch.compile's wrapper; any other module unchanged."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner
