"""Frozen weights: policies for the weights of frozen slices: free, held, or removed by fading.

A zero gradient alone does not hold a weight: momentum and weight decay still change it.  So the
frozen slices are written back after every optimizer step.  All policies are local and
deterministic; they need no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.optimizer_view import OptimizerView, Owners, Shard, StepListener
from ..distributed.collectives import Communicator
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from .fading import NEVER, Fade
from .slices import RepeatedWrite, Slices, group_slices

__all__ = ["Free", "FrozenWeights", "Held", "Removed", "fading_params"]

_FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})


class FrozenWeights(StepListener):
    """Base policy, for soft truncation: the optimizer's updates are left unchanged.

    Attributes:
        irreversible: bool ``[num_channels]``: channels that cannot thaw any more.
    """

    def __init__(self, num_channels: int) -> None:
        self.irreversible = torch.zeros(num_channels, dtype=torch.bool)

    def freeze(self, frozen: Tensor, plan: FreezePlan) -> None:
        """Freeze these channels from now on, and no others.

        Args:
            frozen: bool ``[num_channels]``.
            plan: the generation's freeze plan.
        """

    def fading_params(self, frozen: Tensor) -> Collection[Tensor]:
        """The parameters with frozen slices that change all the same.

        Args:
            frozen: bool ``[num_channels]``.
        """
        return ()

    def zero_since(self) -> Tensor:
        """int64 ``[num_channels]``: the step after which a channel's output is exactly zero."""
        return torch.full(self.irreversible.shape, NEVER)

    def num_nonzero(self, step: int) -> Tensor | int:
        """Number of scales and shifts of such channels that are not zero after this step."""
        return 0

    def state_dict(self, step: int, comm: Communicator) -> dict[str, Any] | None:
        """State that does not follow from frozen channels and weights, in plain values, the same on
        all ranks.  Collective if the optimizer is sharded."""
        return None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore a state; ``freeze`` must follow.  Weights and the optimizer's state may be loaded
        later, but before the next step."""


class Held(FrozenWeights):
    """Policy that holds frozen slices bit for bit.

    A channel that thaws starts with zero momentum and with the second moment it had when it froze:
    without that, the second moment would decay while no gradient arrives, and the first steps after
    the thaw would be several times too large.
    """

    def __init__(self, view: OptimizerView, num_channels: int) -> None:
        super().__init__(num_channels)
        self._view = view
        self._plan: FreezePlan | None = None
        self._held: list[_HeldSlices] | None = []

    def freeze(self, frozen: Tensor, plan: FreezePlan) -> None:
        # Values are copied just before the next step: until then a checkpoint may be loaded.
        self._plan, self._held = plan, None

    def before_step(self) -> None:
        if self._held is None:
            assert self._plan is not None
            items = [
                (shard, block)
                for parameter, block in self._plan.blocks.items()
                for shard in self._view.shards(parameter)
            ]
            self._held = [_HeldSlices(*group, self._view) for group in group_slices(items)]

    def hold(self, step: int, owners: Owners) -> None:
        for held in self._held or ():
            if owners is None or held.shards[0].owner in owners:
                held.restore()


class Removed(Held):
    """Policy that holds frozen slices until their channel is removed: then its scale and shift fade
    to exact zero within a few steps, irreversibly.

    Args:
        view: the optimizer's view.
        network: the bare network.
        groups: its channel groups.
        fade_steps: optimizer steps of a fade.
    """

    def __init__(
        self, view: OptimizerView, network: nn.Module, groups: Groups, fade_steps: int
    ) -> None:
        super().__init__(view, groups.num_channels)
        self._network = network
        self._groups = groups
        self._fade = Fade(view, groups.num_channels, fade_steps)

    def freeze(self, frozen: Tensor, plan: FreezePlan) -> None:
        super().freeze(frozen, plan)
        self._fade.set_scales(self._network, self._groups, self._scales(frozen))

    def begin(self, channels: Tensor, step: int) -> None:
        """Begin to fade frozen channels after this step.

        Args:
            channels: int64 indices of frozen channels.
            step: optimizer steps so far.
        """
        self.irreversible[channels] = True
        self._fade.begin(channels, step)

    def fading_params(self, frozen: Tensor) -> Collection[Tensor]:
        return fading_params(self._network, self._groups, frozen)

    def before_step(self) -> None:
        super().before_step()
        self._fade.before_step()

    def hold(self, step: int, owners: Owners) -> None:
        super().hold(step, owners)
        self._fade.write(step, owners)

    def zero_since(self) -> Tensor:
        return self._fade.over_at

    def num_nonzero(self, step: int) -> Tensor | int:
        return self._fade.num_nonzero(step)

    def state_dict(self, step: int, comm: Communicator) -> dict[str, Any]:
        return self._fade.state_dict(step, comm, self._names)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        assert state is not None
        self._fade.load_state_dict(state, dict(self._network.named_parameters()))
        self.irreversible = self._fade.over_at < NEVER

    def _scales(self, channels: Tensor) -> FreezePlan:
        """The freeze plan of these channels' scales and shifts."""
        return FreezePlan(self._network, self._groups, channels, "norm")

    @property
    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._network.named_parameters()}


class Free(FrozenWeights):
    """Policy in which momentum, weight decay and the L1 penalty still change frozen slices.

    The gradient of the penalty is truncated with the rest of the loss's gradient, so it is added
    again here, locally.

    Args:
        view: the optimizer's view.
        network: the bare network.
        groups: its channel groups.
        penalty_weight: returns the weight of the penalty in the loss of the step under way.
    """

    def __init__(
        self,
        view: OptimizerView,
        network: nn.Module,
        groups: Groups,
        penalty_weight: Callable[[], float],
    ) -> None:
        super().__init__(groups.num_channels)
        self._penalty_weight = penalty_weight
        self._optimizer = view.optimizer
        parameters = dict(network.named_parameters())
        self._scales = {
            parameters[member.parameters[0][0]]
            for group in groups
            for member in group.norms + group.gates
        }
        self._frozen: Mapping[Tensor, Tensor] = {}

    def freeze(self, frozen: Tensor, plan: FreezePlan) -> None:
        self._frozen = {p: b.frozen[0] for p, b in plan.blocks.items() if p in self._scales}

    @torch.no_grad()
    def before_step(self) -> None:
        # A fused optimizer receives gradients that are still scaled, and unscales them itself.
        loss_scale = getattr(self._optimizer, "grad_scale", None)
        for scale, frozen in self._frozen.items():
            if scale.grad is not None:
                pull = scale.index_select(0, frozen).sign_().mul_(self._penalty_weight())
                if loss_scale is not None:
                    pull.mul_(loss_scale)
                scale.grad.index_add_(0, frozen, pull.to(scale.grad.dtype))


class _HeldSlices:
    """Copies of the frozen slices of shards and of their optimizer state, to restore.

    Args:
        shards: shards that the optimizer steps together.
        slices: their frozen slices.
        view: the optimizer's view.
    """

    @torch.no_grad()
    def __init__(self, shards: Sequence[Shard], slices: Slices, view: OptimizerView) -> None:
        self.shards = shards
        self._slices = slices
        self._view = view
        self._tensors = [shard.value for shard in shards]
        self._values = slices.take(self._tensors)
        self._moments = {
            key: slices.take(tensors)
            for key, tensors in self._current_moments().items()
            if key not in _FIRST_MOMENTS
        }
        self._write = RepeatedWrite(slices)

    @torch.no_grad()
    def restore(self) -> None:
        moments = self._current_moments().items()
        held = [(tensors, self._moments.get(key)) for key, tensors in moments]
        self._write([(self._tensors, self._values), *held])

    def _current_moments(self) -> dict[str, list[Tensor | None]]:
        """The per-element optimizer state by key, in the order of the shards."""
        moments = [self._view.moments(shard) for shard in self.shards]
        keys = {key: None for of_shard in moments for key in of_shard}
        return {key: [of_shard.get(key) for of_shard in moments] for key in keys}


def fading_params(network: nn.Module, groups: Groups, frozen: Tensor) -> set[Tensor]:
    """The scales and shifts of groups in which any of these channels are frozen; see
    ``FrozenWeights.fading_params``."""
    parameters = dict(network.named_parameters())
    return {
        parameters[name]
        for group, frozen_here in zip(groups, groups.split(frozen).values())
        if bool(frozen_here.any())
        for member in group.zeroing_members
        for name, _ in member.parameters
    }
