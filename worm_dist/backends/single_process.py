"""Single process: a bare network, whose gradients are not reduced."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import TruncationConfig
from ..distributed.collectives import Communicator, SingleProcessComm
from .backend import not_compiled
from .optimizer_view import OptimizerView
from .optimizers import innermost
from .whole_weights import WholeWeights

__all__ = ["SingleProcess"]


class SingleProcess(WholeWeights):
    """A bare network on one process; see ``Backend`` for its members."""

    process_group = None
    step_bytes = 0
    has_one_copy = True
    averages = False
    finds_unused = False
    keeps_hooks = False
    rebuilds_buckets = False

    def __init__(self, called: nn.Module) -> None:
        self.called = called
        self.network = not_compiled(called)
        self.comm: Communicator = SingleProcessComm()

    @property
    def averaged(self) -> frozenset[Tensor]:
        """All parameters; see ``Backend``."""
        return frozenset(self.network.parameters())

    def require_fit(self, truncation: TruncationConfig) -> None:
        """Accept all settings: no gradients are reduced."""

    def reduces_at_once(self, truncation: TruncationConfig) -> bool:
        return False

    def make_reducer(self, truncation: TruncationConfig) -> NoReturn:
        raise AssertionError("a single process has no gradients to reduce")

    def optimizer_view(self, optimizer: Optimizer | None) -> OptimizerView:
        """See ``Backend``."""
        return OptimizerView(innermost(optimizer))

    def user_optimizer(self, view: OptimizerView) -> Optimizer:
        """See ``Backend``."""
        return view.optimizer

    def release(self) -> None:
        """Do nothing: there is no wrapper."""

    def rewrap(self) -> nn.Module:
        """The module that the user calls; there is no wrapper to renew."""
        return self.called

    def retire(self) -> None:
        """Do nothing: there is no wrapper."""

    def revive(self) -> nn.Module:
        """The module that the user calls."""
        return self.called
