"""Truncation: freeze channels: their gradients, their traffic and their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.backend import Backend
from ..backends.optimizer_view import OptimizerView, Owners
from ..comm_hooks.grad_hooks import GradientHooks
from ..comm_hooks.reducer import Reducer
from ..config import TruncationConfig
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from .frozen_weights import Free, FrozenWeights, Held, Removed
from .zero_columns import ZeroColumns

__all__ = ["Truncation", "first_reducer", "pruned_state"]


class Truncation:
    """The frozen channels of a network, none before the first ``freeze``.

    Args:
        config: the settings of truncation.
        backend: the network's backend.
        view: the optimizer's view.
        groups: the network's channel groups.
        trained: the parameters that train at any time.

    Attributes:
        generation: number of freeze plans so far.
        frozen: bool ``[num_channels]``, the channels frozen now.
        reducer: the gradient reducer; None while the wrapper reduces by itself.
    """

    def __init__(
        self,
        config: TruncationConfig,
        backend: Backend,
        view: OptimizerView,
        groups: Groups,
        trained: Collection[Tensor],
    ) -> None:
        self._config = config
        self._backend: Backend | None = backend
        self._network = backend.network
        self._comm = backend.comm
        self._groups = groups
        self._trained = trained
        self._weights = _frozen_weights(config, backend.network, view, groups)
        self._columns = ZeroColumns(groups.num_channels)
        self.generation = 0
        self.frozen = torch.zeros(groups.num_channels, dtype=torch.bool)
        self.reducer = first_reducer(config, backend)
        self._hooks = GradientHooks(0 if config.mode == "hard" else config.ratio)
        self._live_fraction = 1.0

    @property
    def irreversible(self) -> Tensor:
        """bool ``[num_channels]``: channels whose fade has begun, and which cannot thaw."""
        return self._weights.irreversible

    @property
    def live_fraction(self) -> float:
        """Share of live elements among all trained ones, 0 to 1; 1 in soft mode."""
        return self._live_fraction

    def zero(self, step: int) -> Tensor:
        """bool ``[num_channels]``: channels whose output is exactly zero after this step."""
        return self._weights.zero_since() <= step

    def freeze(self, frozen: Tensor) -> None:
        """Freeze these channels and the irreversible ones; others thaw.

        The ranks must have agreed on the bits of ``frozen``, which determine the packed buffers.

        Args:
            frozen: bool ``[num_channels]``.
        """
        frozen = frozen | self.irreversible
        if not torch.equal(frozen, self.frozen):
            self.generation += 1
            self.frozen = frozen
            plan = self._truncate_gradients()
            self._weights.freeze(frozen, plan)

    def begin(self, channels: Tensor, step: int) -> None:
        """Begin to fade frozen channels after this step.

        Args:
            channels: int64 indices of frozen channels.
            step: optimizer steps so far.
        """
        assert isinstance(self._weights, Removed) and bool(self.frozen[channels].all())
        self._weights.begin(channels, step)

    def state_dict(self, step: int) -> dict[str, Any]:
        """The state after this step in plain values, the same on all ranks.  Collective if the
        optimizer is sharded.

        Held values are not part of it: they are in the weights and the optimizer's state.
        """
        return {
            "generation": self.generation,
            "frozen": self.frozen.clone(),
            "removal": self._weights.state_dict(step, self._comm),
            "columns": self._columns.state_dict(),
            "probes": self.reducer is not None and self.reducer.nonzero_seen is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.  Weights and the optimizer's state may be loaded later, but before the
        next step."""
        self.generation = state["generation"]
        if self.generation == 0:
            return
        self.frozen = state["frozen"].to("cpu", copy=True)
        self._weights.load_state_dict(state["removal"])
        self._columns.load_state_dict(state["columns"])
        plan = self._truncate_gradients()
        self._weights.freeze(self.frozen, plan)
        if self.reducer is not None and state["probes"]:
            self._probe(state["columns"]["probed"].to("cpu"))

    def before_step(self, penalty: float) -> None:
        """Call before an optimizer step; ``penalty`` is the weight of the L1 penalty on the scales
        in its loss."""
        self._weights.before_step(penalty)

    def hold(self, step: int, owners: Owners) -> None:
        """Call right after the ``step``-th optimizer step has changed ``owners``."""
        self._weights.hold(step, owners)

    def after_step(self, step: int) -> None:
        """Call after the ``step``-th optimizer step: drops and probes zero columns."""
        if self.reducer is None or not isinstance(self._weights, Removed):
            return
        if self._columns.after_step(self.reducer, self._comm, step):
            self.generation += 1
            self._truncate_gradients()
        if self.reducer.nonzero_seen is None:
            self._columns.probe(self.zero(step), self.frozen, self._probe)

    def remove(self) -> None:
        """Stop truncating gradients and holding weights."""
        self._hooks.remove()
        if self.reducer is not None:
            self.reducer.remove()
        self.reducer = None
        self._weights = FrozenWeights(self._groups.num_channels)
        self._backend = None  # its wrapper's buckets are as large as the dense network

    def _truncate_gradients(self) -> FreezePlan:
        """Set the freeze plan of reducer or hooks; returns the plan of the held slices."""
        frozen, scope = self.frozen, self._config.scope
        held = plan = FreezePlan(self._network, self._groups, frozen, scope)
        if bool(self._columns.dropped.any()):
            plan = FreezePlan(self._network, self._groups, frozen, scope, self._columns.dropped)
        if self._config.mode == "hard":
            self._live_fraction = plan.live_fraction(self._trained)
        assert self._backend is not None
        if self._config.mode == "soft" or not self._backend.averages:
            self._hooks.set_plan(plan)
        else:
            if self.reducer is None:
                # Not earlier: while nothing is frozen, DDP averages by itself.
                self.reducer = self._backend.make_reducer(self._config)
            # Channels whose columns are dropped are zero already and will not change again.
            fading_params = self._weights.fading_params(frozen & ~self._columns.dropped)
            self.reducer.set_plan(plan, held, fading_params)
        return held

    def _probe(self, zero: Tensor) -> None:
        assert self.reducer is not None
        nothing = torch.zeros_like(zero)
        columns = FreezePlan(self._network, self._groups, nothing, self._config.scope, zero)
        self.reducer.probe(columns, next(self._network.parameters()).device)


def pruned_state(
    state: Mapping[str, Any], kept: Tensor, prune: Callable[[str, Tensor], Tensor]
) -> dict[str, Any]:
    """The state of a truncation after channels have been removed physically.

    Args:
        state: the state of a ``Truncation`` before.
        kept: bool ``[num_channels]``, the channels that are kept.
        prune: called with a parameter's name and a tensor of its shape; returns the tensor without
            the removed channels.
    """
    removal, columns = state["removal"], state["columns"]
    if removal is not None:
        starts = removal["starts"]
        removal = {
            "over_at": removal["over_at"][kept],
            "under_way": removal["under_way"][kept],
            "starts": starts and {name: prune(name, start) for name, start in starts.items()},
        }
    columns = {k: v[kept] if isinstance(v, Tensor) else v for k, v in columns.items()}
    return {**state, "frozen": state["frozen"][kept], "removal": removal, "columns": columns}


def first_reducer(config: TruncationConfig, backend: Backend) -> Reducer | None:
    """The reducer to use while nothing is frozen; None if the wrapper reduces by itself."""
    needed = backend.averages and config.mode == "hard" and backend.reduces_at_once(config)
    return backend.make_reducer(config) if needed else None


def _frozen_weights(
    config: TruncationConfig, network: nn.Module, view: OptimizerView, groups: Groups
) -> FrozenWeights:
    if config.mode != "hard":
        return FrozenWeights(groups.num_channels)
    if config.frozen_weights == "remove":
        return Removed(view, network, groups, config.removal.fade_steps)
    if config.frozen_weights == "hold":
        return Held(view, groups.num_channels)
    return Free(view, network, groups)
