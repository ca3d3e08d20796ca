"""Frozen weights: what frozen slices do instead of training, whatever the optimizer does.

A zero gradient alone does not keep a weight still: momentum and weight decay go on moving it.  So
after every optimizer step the frozen slices are written back.  All rules are local and
deterministic; no rank needs to be told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.optimizer_view import OptimizerView, Owners, Shard
from ..distributed.collectives import Communicator
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import Block, FreezePlan
from .fading import NEVER, Fade

__all__ = ["Free", "FrozenWeights", "Held", "Removed"]

_FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})


class FrozenWeights:
    """Frozen slices move as the optimizer says: the rule of soft truncation, which freezes nothing.

    Attributes:
        irreversible: bool ``[num_channels]``: channels that cannot thaw any more.
    """

    def __init__(self, num_channels: int) -> None:
        self.irreversible = torch.zeros(num_channels, dtype=torch.bool)

    def freeze(self, frozen: Tensor, plan: FreezePlan) -> None:
        """These channels are frozen from now on, and no others.

        Args:
            frozen: bool ``[num_channels]``.
            plan: of the generation.
        """

    def moving(self, frozen: Tensor) -> Collection[Tensor]:
        """The parameters of which frozen slices move, if these channels are frozen."""
        return ()

    def before_step(self, penalty: float) -> None:
        """Just before an optimizer step; ``penalty`` is the weight of the L1 on the scales."""

    def hold(self, step: int, owners: Owners) -> None:
        """The ``step``-th optimizer step has just moved these tensors, or all."""

    def zero_since(self) -> Tensor:
        """int64 ``[num_channels]``: the step after which a channel puts out exact zeros."""
        return torch.full(self.irreversible.shape, NEVER)

    def state_dict(self, step: int, ranks: Communicator) -> dict[str, Any] | None:
        """What does not follow from frozen channels and weights, in plain values, the same on all
        ranks.  Collective if the ranks share the stepping."""
        return None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; ``freeze`` follows.  Weights and the optimizer's state may be loaded
        later, but before the next step."""


class Held(FrozenWeights):
    """Frozen slices stay bit for bit.

    A channel that thaws starts with zero momentum and with the second moment it had when it froze:
    left alone, the second moment would decay while no gradient arrives, and the first steps after
    the thaw would be several times too large.
    """

    def __init__(self, stepping: OptimizerView, num_channels: int) -> None:
        super().__init__(num_channels)
        self._stepping = stepping
        self._plan: FreezePlan | None = None
        self._held: list[_HeldSlices] | None = []

    def freeze(self, frozen: Tensor, plan: FreezePlan) -> None:
        # What is held is looked at when it is about to move: until then a checkpoint may be loaded.
        self._plan, self._held = plan, None

    def before_step(self, penalty: float) -> None:
        if self._held is None:
            assert self._plan is not None
            self._held = [
                _HeldSlices(shard, block, self._stepping.moments(shard))
                for parameter, block in self._plan.blocks.items()
                for shard in self._stepping.shards(parameter)
            ]

    def hold(self, step: int, owners: Owners) -> None:
        for slices in self._held or ():
            if owners is None or slices.shard.owner in owners:
                slices.restore(self._stepping.moments(slices.shard))


class Removed(Held):
    """Frozen slices are held until their channel begins to leave; then what scales it goes to exact
    zero within a few steps, and it does not come back.

    Args:
        fade_steps: how many steps that takes.
    """

    def __init__(
        self, stepping: OptimizerView, network: nn.Module, groups: Groups, fade_steps: int
    ) -> None:
        super().__init__(stepping, groups.num_channels)
        self._network = network
        self._groups = groups
        self._fade = Fade(stepping, groups.num_channels, fade_steps)

    def freeze(self, frozen: Tensor, plan: FreezePlan) -> None:
        super().freeze(frozen, plan)
        self._fade.follow(self._network, self._groups, self._scales(frozen))

    def begin(self, channels: Tensor, step: int) -> None:
        """Frozen channels begin to leave after this step.

        Args:
            channels: int64, of those that are frozen.
        """
        self.irreversible[channels] = True
        self._fade.begin(channels, step)

    def moving(self, frozen: Tensor) -> Collection[Tensor]:
        return self._scales(frozen).blocks.keys()

    def before_step(self, penalty: float) -> None:
        super().before_step(penalty)
        self._fade.before_step()

    def hold(self, step: int, owners: Owners) -> None:
        super().hold(step, owners)
        self._fade.write(step, owners)

    def zero_since(self) -> Tensor:
        return self._fade.over_at

    def state_dict(self, step: int, ranks: Communicator) -> dict[str, Any]:
        return self._fade.state_dict(step, ranks, self._names)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        assert state is not None
        self._fade.load_state_dict(state, dict(self._network.named_parameters()))
        self.irreversible = self._fade.over_at < NEVER

    def _scales(self, channels: Tensor) -> FreezePlan:
        """What scales these channels is frozen in it."""
        return FreezePlan(self._network, self._groups, channels, "norm")

    @property
    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._network.named_parameters()}


class Free(FrozenWeights):
    """Frozen slices get no data gradient, but the optimizer's momentum and decay still move them,
    and the penalty does, locally: what arrives through the loss is truncated with the rest."""

    def __init__(self, stepping: OptimizerView, network: nn.Module, groups: Groups) -> None:
        super().__init__(groups.num_channels)
        self._optimizer = stepping.optimizer
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
    def before_step(self, penalty: float) -> None:
        # A fused optimizer is handed gradients that are still scaled, and divides them itself.
        loss_scale = getattr(self._optimizer, "grad_scale", None)
        for scale, frozen in self._frozen.items():
            if scale.grad is not None:
                pull = scale.index_select(0, frozen).sign_().mul_(penalty)
                if loss_scale is not None:
                    pull.mul_(loss_scale)
                scale.grad.index_add_(0, frozen, pull.to(scale.grad.dtype))


class _HeldSlices:
    """The frozen slices of one parameter and of its optimizer state, as they were: of the part of
    it that this rank steps."""

    @torch.no_grad()
    def __init__(self, shard: Shard, block: Block, moments: Mapping[str, Tensor]) -> None:
        self.shard = shard
        self._places = block.part(shard.begin, shard.value.numel()).frozen
        self._values = self._copy(shard.value)
        self._moments = {
            key: self._copy(moment) for key, moment in moments.items() if key not in _FIRST_MOMENTS
        }

    @torch.no_grad()
    def restore(self, moments: Mapping[str, Tensor]) -> None:
        self._write(self.shard.value, self._values)
        for key, moment in moments.items():
            self._write(moment, self._moments.get(key, {}))

    def _copy(self, tensor: Tensor) -> dict[int, Tensor]:
        return {dim: tensor.index_select(dim, at) for dim, at in self._places.items()}

    def _write(self, tensor: Tensor, values: Mapping[int, Tensor]) -> None:
        """Put slices back; where there are none, zeros."""
        for dim, places in self._places.items():
            if dim in values:
                tensor.index_copy_(dim, places, values[dim])
            else:
                tensor.index_fill_(dim, places, 0)
