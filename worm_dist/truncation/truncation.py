"""Truncation: freeze channels: their gradients, their traffic and their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.gradient_reduction import GradientReduction
from ..backends.optimizer_view import OptimizerView, StepListener
from ..comm_hooks.grad_hooks import GradientHooks
from ..config import TruncationConfig
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from ..schema import Count, Flags, Schema, Share
from .fading import Fade, FadeSchema
from .frozen_weights import Free, FrozenWeights, Held, Removed
from .zero_columns import ZeroColumns, ZeroColumnsSchema

__all__ = ["Truncation", "TruncationSchema"]


class TruncationSchema(Schema):
    """Schema of ``Truncation.state_dict``."""

    generation: Count
    frozen: Flags
    ratio: Share
    scales: dict[str, Flags] | None
    fade: FadeSchema | None
    columns: ZeroColumnsSchema
    probes: bool

    def vectors(self) -> dict[str, Tensor]:
        """The tensors with one element for each channel, by key."""
        fade = {} if self.fade is None else self.fade.vectors()
        return {
            "frozen": self.frozen,
            **{f"fade.{key}": vector for key, vector in fade.items()},
            **{f"columns.{key}": vector for key, vector in self.columns.vectors().items()},
        }


class Truncation(StepListener):
    """The frozen channels of a network, none before the first ``freeze``.

    Args:
        config: the settings of truncation.
        reduction: the network's gradient reduction.
        view: the optimizer's view.
        groups: the network's channel groups.
        trained: the parameters that train at any time.
        penalty_weight: returns the weight of the L1 penalty on the scales in the loss of the step
            under way.

    Attributes:
        generation: number of freeze plans so far.
        frozen: bool ``[num_channels]``, the channels frozen now.
        step_listeners: what acts around an optimizer step.
    """

    def __init__(
        self,
        config: TruncationConfig,
        reduction: GradientReduction,
        view: OptimizerView,
        groups: Groups,
        trained: Collection[Tensor],
        penalty_weight: Callable[[], float],
    ) -> None:
        self._config = config
        self._reduction = reduction
        self._network = reduction.backend.network
        self._comm = reduction.backend.comm
        self._groups = groups
        self._trained = trained
        self._weights = _frozen_weights(config, self._network, view, groups, penalty_weight)
        self._columns = ZeroColumns(groups.num_channels)
        self.generation = 0
        self.frozen = torch.zeros(groups.num_channels, dtype=torch.bool)
        self._scales: Mapping[str, Tensor] | None = None
        self._ratio = 0.0 if config.mode == "hard" else 1.0
        if config.mode != "hard" and config.ratio != "distance":
            self._ratio = config.ratio
        self._hooks = GradientHooks()
        self._live_fraction = 1.0

    @property
    def step_listeners(self) -> Sequence[StepListener]:
        return (self._weights, self)

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

    def num_nonzero(self, step: int) -> Tensor | int:
        """Number of scales and shifts that are not zero although their channel is, after this step:
        those that this rank steps."""
        return self._weights.num_nonzero(step)

    def freeze(
        self,
        frozen: Tensor,
        scales: Mapping[str, Tensor] | None = None,
        distance: float | None = None,
    ) -> None:
        """Freeze these channels and the irreversible ones; others thaw.

        The ranks must have agreed on the bits of ``frozen``, which determine the packed buffers.

        Args:
            frozen: bool ``[num_channels]``.
            scales: soft mode: by name of every scale parameter, the elements whose gradients are
                truncated, bool ``[elements]``; None for those of the frozen channels.
            distance: the mean distance of the newest mask, 0 to 1; None for that of the call
                before.
        """
        assert scales is None or self._config.mode == "soft", "removal is of whole channels"
        frozen = frozen | self.irreversible
        ratio = self._ratio if distance is None else self._ratio_at(distance)
        is_same = torch.equal(frozen, self.frozen) and _are_equal(scales, self._scales)
        if not is_same or ratio != self._ratio:
            self.generation += 1
            self._ratio = ratio
            self.frozen, self._scales = frozen, scales
            plan = self._truncate_gradients()
            self._weights.freeze(frozen, plan)

    def _ratio_at(self, distance: float) -> float:
        """What remains of truncated gradients at this mean distance of the newest mask."""
        if self._config.mode != "soft" or self._config.ratio != "distance":
            return self._ratio
        is_near = distance < self._config.near_distance
        return self._config.near_ratio if is_near else distance

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
        reducer = self._reduction.reducer
        return {
            "generation": self.generation,
            "frozen": self.frozen.clone(),
            "ratio": self._ratio,
            "scales": None if self._scales is None else dict(self._scales),
            "fade": self._weights.state_dict(step, self._comm),
            "columns": self._columns.state_dict(),
            "probes": reducer is not None and reducer.nonzero_seen is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.  Weights and the optimizer's state may be loaded later, but before the
        next step."""
        self.generation = state["generation"]
        if self.generation == 0:
            return
        self.frozen = state["frozen"].to("cpu", copy=True)
        self._ratio = state["ratio"]
        scales = state["scales"]
        self._scales = scales and {name: here.to("cpu", copy=True) for name, here in scales.items()}
        self._weights.load_state_dict(state["fade"])
        self._columns.load_state_dict(state["columns"])
        plan = self._truncate_gradients()
        self._weights.freeze(self.frozen, plan)
        if self._reduction.reducer is not None and state["probes"]:
            self._probe(state["columns"]["probed"].to("cpu"))

    @staticmethod
    def pruned_state(
        state: Mapping[str, Any], kept: Tensor, prune: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Any]:
        """A state of ``state_dict`` after channels have been removed physically.

        Args:
            state: the state of a truncation before.
            kept: bool ``[num_channels]``, the channels that are kept.
            prune: called with a parameter's name and a tensor of its shape; returns the tensor
                without the removed channels.
        """
        fade = state["fade"]
        return {
            **state,
            "frozen": state["frozen"][kept],
            "fade": None if fade is None else Fade.pruned_state(fade, kept, prune),
            "columns": ZeroColumns.pruned_state(state["columns"], kept),
        }

    def after_step(self, step: int) -> None:
        """Drop and probe zero columns."""
        reducer = self._reduction.reducer
        if reducer is None or not isinstance(self._weights, Removed):
            return
        if self._columns.after_step(reducer, self._comm, step):
            self.generation += 1
            self._truncate_gradients()
        if reducer.nonzero_seen is None:
            self._columns.probe(self.zero(step), self.frozen, self._probe)

    def remove(self) -> None:
        """Stop truncating gradients and holding weights; the reducer is its owner's to remove."""
        self._hooks.remove()
        self._weights = FrozenWeights(self._groups.num_channels)

    def _truncate_gradients(self) -> FreezePlan:
        """Set the freeze plan of reducer or hooks; returns the plan of the held slices."""
        frozen, scope = self.frozen, self._config.scope
        held = plan = FreezePlan(self._network, self._groups, frozen, scope, scales=self._scales)
        if bool(self._columns.dropped.any()):
            plan = FreezePlan(self._network, self._groups, frozen, scope, self._columns.dropped)
        if self._config.mode == "hard":
            self._live_fraction = plan.live_fraction(self._trained)
        if self._reduction.is_ours:
            # Channels whose columns are dropped are zero already and will not change again.
            fading_params = self._weights.fading_params(frozen & ~self._columns.dropped)
            reducer = self._reduction.require_reducer()
            reducer.set_plan(plan, held, fading_params, self._unread())
        else:
            self._hooks.set_plan(plan, self._ratio)
        return held

    def _unread(self) -> FreezePlan | None:
        """All slices of channels whose output is exactly zero for good."""
        zero = self._columns.dropped
        if not bool(zero.any()):
            return None
        return FreezePlan(self._network, self._groups, zero, "coupled")

    def _probe(self, zero: Tensor) -> None:
        nothing = torch.zeros_like(zero)
        columns = FreezePlan(self._network, self._groups, nothing, self._config.scope, zero)
        reducer = self._reduction.require_reducer()
        reducer.probe(columns, next(self._network.parameters()).device)


def _are_equal(one: Mapping[str, Tensor] | None, other: Mapping[str, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _frozen_weights(
    config: TruncationConfig,
    network: nn.Module,
    view: OptimizerView,
    groups: Groups,
    penalty_weight: Callable[[], float],
) -> FrozenWeights:
    if config.mode != "hard":
        return FrozenWeights(groups.num_channels)
    if config.frozen_weights == "remove":
        return Removed(view, network, groups, config.removal.fade_steps)
    if config.frozen_weights == "hold":
        return Held(view, groups.num_channels)
    return Free(view, network, groups, penalty_weight)
