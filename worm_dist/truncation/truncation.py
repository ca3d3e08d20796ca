"""Truncation: the generation in force, and what it does to gradients, traffic and weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.ddp import Backend, DdpBackend, SingleProcess
from ..backends.deepspeed import DeepSpeedBackend
from ..backends.optimizer_view import OptimizerView, Owners
from ..comm_hooks.allreduce import AllReduce, Averager
from ..comm_hooks.ddp_hook import PackedReducer, packed_allreduce
from ..comm_hooks.deepspeed_reduce import DeepSpeedReducer
from ..comm_hooks.grad_hooks import GradientHooks
from ..comm_hooks.powersgd import PowerSGD
from ..comm_hooks.reducer import Reducer
from ..config import TruncationConfig
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from .frozen_weights import Free, FrozenWeights, Held, Removed
from .zero_columns import ZeroColumns

__all__ = ["Truncation", "first_reduction", "state_left"]

_WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Truncation:
    """Frozen channels and everything that follows from them; none before the first ``freeze``.

    Args:
        config: which slices freeze, and how.
        wrapping: of the network.
        stepping: of its optimizer.
        groups: channel groups of the network.
        trained: its parameters that train at some time.

    Attributes:
        generation: how many sets of slices have been left out of the all-reduce.
        frozen: bool ``[num_channels]``, the channels frozen now.
        reduction: how gradients are sent, None while that is left to the wrapper.
    """

    def __init__(
        self,
        config: TruncationConfig,
        wrapping: Backend,
        stepping: OptimizerView,
        groups: Groups,
        trained: Collection[Tensor],
    ) -> None:
        self._config = config
        self._wrapping: Backend = wrapping
        self._network = wrapping.network
        self._ranks = wrapping.ranks
        self._groups = groups
        self._trained = trained
        self._weights = _frozen_weights(config, wrapping.network, stepping, groups)
        self._columns = ZeroColumns(groups.num_channels)
        self.generation = 0
        self.frozen = torch.zeros(groups.num_channels, dtype=torch.bool)
        self.reduction = first_reduction(config, wrapping)
        self._hooks = GradientHooks(0 if config.mode == "hard" else config.ratio)
        self._live_fraction = 1.0

    @property
    def irreversible(self) -> Tensor:
        """bool ``[num_channels]``: channels that have begun to leave, and cannot be kept."""
        return self._weights.irreversible

    @property
    def live_fraction(self) -> float:
        """Live elements of all that are trained.  Soft truncation freezes nothing."""
        return self._live_fraction

    def zero(self, step: int) -> Tensor:
        """bool ``[num_channels]``: channels that put out exact zeros after this step."""
        return self._weights.zero_since() <= step

    def freeze(self, frozen: Tensor) -> None:
        """Freeze these channels and those that have begun to leave; others thaw.

        The ranks must have agreed on the bits of ``frozen``: buffers are packed by them.

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
        """Frozen channels, int64, begin to leave after this step."""
        assert isinstance(self._weights, Removed) and bool(self.frozen[channels].all())
        self._weights.begin(channels, step)

    def state_dict(self, step: int) -> dict[str, Any]:
        """The generation in force after this step, in plain values, the same on all ranks.
        Collective if the ranks share the stepping.

        What is held is not in it: that is in the weights and in the optimizer's state.
        """
        return {
            "generation": self.generation,
            "frozen": self.frozen.clone(),
            "removal": self._weights.state_dict(step, self._ranks),
            "columns": self._columns.state_dict(),
            "probes": self.reduction is not None and self.reduction.nonzero_seen is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.  Weights and the optimizer's state may be loaded later, but before
        the next step."""
        self.generation = state["generation"]
        if self.generation == 0:
            return
        self.frozen = state["frozen"].to("cpu", copy=True)
        self._weights.load_state_dict(state["removal"])
        self._columns.load_state_dict(state["columns"])
        plan = self._truncate_gradients()
        self._weights.freeze(self.frozen, plan)
        if self.reduction is not None and state["probes"]:
            self._probe(state["columns"]["probed"].to("cpu"))

    def before_step(self, penalty: float) -> None:
        """Just before an optimizer step; ``penalty`` is the weight of the L1 on the scales."""
        self._weights.before_step(penalty)

    def hold(self, step: int, owners: Owners) -> None:
        """The ``step``-th optimizer step has just moved these tensors, or all."""
        self._weights.hold(step, owners)

    def after_step(self, step: int) -> None:
        """Just after the ``step``-th optimizer step: columns that read nothing but zeros leave."""
        if self.reduction is None or not isinstance(self._weights, Removed):
            return
        if self._columns.seen(self.reduction, self._ranks, step):
            self.generation += 1
            self._truncate_gradients()
        if self.reduction.nonzero_seen is None:
            self._columns.probe(self.zero(step), self.frozen, self._probe)

    def remove(self) -> None:
        """Leave gradients and weights alone from now on."""
        self._hooks.remove()
        if self.reduction is not None:
            self.reduction.remove()
        self.reduction = None
        self._weights = FrozenWeights(self._groups.num_channels)
        # The wrapper holds buckets as large as the dense network; let go of it.
        self._wrapping = SingleProcess(self._network)

    def _truncate_gradients(self) -> FreezePlan:
        """Returns which slices are frozen."""
        frozen, scope = self.frozen, self._config.scope
        held = plan = FreezePlan(self._network, self._groups, frozen, scope)
        if bool(self._columns.dropped.any()):
            plan = FreezePlan(self._network, self._groups, frozen, scope, self._columns.dropped)
        if self._config.mode == "hard":
            self._live_fraction = plan.live_fraction(self._trained)
        if self._config.mode == "soft" or isinstance(self._wrapping, SingleProcess):
            self._hooks.adopt(plan)
        else:
            if self.reduction is None:
                # Not before it is needed: while nothing is frozen, DDP averages by itself.
                self.reduction = _register_reduction(self._config, self._wrapping)
            # What reads zeros for good reads channels that will not move again.
            moving = self._weights.moving(frozen & ~self._columns.dropped)
            self.reduction.adopt(plan, held, moving)
        return held

    def _probe(self, zero: Tensor) -> None:
        assert self.reduction is not None
        nothing = torch.zeros_like(zero)
        columns = FreezePlan(self._network, self._groups, nothing, self._config.scope, zero)
        self.reduction.probe(columns, next(self._network.parameters()).device)


def state_left(
    state: Mapping[str, Any], kept: Tensor, left_of: Callable[[str, Tensor], Tensor]
) -> dict[str, Any]:
    """The state of a truncation once channels have been removed.

    Args:
        state: of a ``Truncation``.
        kept: bool ``[num_channels]``, the channels that are left.
        left_of: what is left of a tensor of the shape of the parameter with this name.
    """
    removal, columns = state["removal"], state["columns"]
    if removal is not None:
        starts = removal["starts"]
        removal = {
            "over_at": removal["over_at"][kept],
            "under_way": removal["under_way"][kept],
            "starts": starts and {name: left_of(name, start) for name, start in starts.items()},
        }
    columns = {k: v[kept] if isinstance(v, Tensor) else v for k, v in columns.items()}
    return {**state, "frozen": state["frozen"][kept], "removal": removal, "columns": columns}


def first_reduction(config: TruncationConfig, wrapping: Backend) -> Reducer | None:
    """How gradients are sent while nothing is frozen; None where that is left to the wrapper."""
    if isinstance(wrapping, SingleProcess) or config.mode != "hard":
        return None
    if isinstance(wrapping, DdpBackend) and config.compression == "none":
        return None
    return _register_reduction(config, wrapping)


def _register_reduction(
    config: TruncationConfig, wrapping: DdpBackend | DeepSpeedBackend
) -> Reducer:
    """Take the place, or the places, where gradients are averaged."""
    if isinstance(wrapping, DeepSpeedBackend):
        return DeepSpeedReducer(wrapping)
    averaging: Averager
    if config.compression == "powersgd":
        averaging = PowerSGD(wrapping.process_group, config.compression_rank)
    else:
        averaging = AllReduce(wrapping.process_group, _WIRE_DTYPES.get(config.compression))
    reduction = PackedReducer(averaging, wrapping.process_group)
    wrapping.model.register_comm_hook(reduction, packed_allreduce)
    return reduction


def _frozen_weights(
    config: TruncationConfig, network: nn.Module, stepping: OptimizerView, groups: Groups
) -> FrozenWeights:
    if config.mode != "hard":
        return FrozenWeights(groups.num_channels)
    if config.frozen_weights == "remove":
        return Removed(stepping, network, groups, config.removal.fade_steps)
    if config.frozen_weights == "hold":
        return Held(stepping, groups.num_channels)
    return Free(stepping, network, groups)
