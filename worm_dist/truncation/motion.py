"""Motion: what frozen slices do instead of training, whatever the optimizer does.

A zero gradient alone does not keep a weight still: momentum and weight decay go on moving it.  So
after every optimizer step the frozen slices are written back.  All rules are local and
deterministic; no rank needs to be told.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cluster.agree import Ranks
from ..cluster.stepping import Owners, Shard, Stepping
from ..search.groups import Groups
from .fading import Fading
from .plan import Block, Plan

__all__ = ["Fade", "Free", "Hold", "Motion"]

_FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})


class Motion:
    """Frozen slices move as the optimizer says: the rule of soft truncation, which freezes nothing.

    Attributes:
        lost: bool ``[num_channels]``: channels that cannot thaw any more.
    """

    def __init__(self, num_channels: int) -> None:
        self.lost = torch.zeros(num_channels, dtype=torch.bool)

    def freeze(self, frozen: Tensor, plan: Plan, step: int, fade_steps: int) -> None:
        """Take over the channels in ``frozen`` (bool ``[num_channels]``) after this step."""

    def moving(self, frozen: Tensor) -> Collection[Tensor]:
        """The parameters of which frozen slices move, if these channels are frozen."""
        return ()

    def before_step(self, penalty: float) -> None:
        """Just before an optimizer step; ``penalty`` is the weight of the L1 on the scales."""

    def fades(self, step: int, ranks: Ranks) -> list[dict[str, Any]]:
        """The fades that have begun up to this step, for ``resume``; the same on all ranks.
        Collective if the ranks share the stepping."""
        return []

    def resume(self, frozen: Tensor, plan: Plan, fades: Sequence[Mapping[str, Any]]) -> None:
        """Go on with these frozen channels and fades.  Weights and optimizer state may be loaded
        later, but before the next step."""
        self.freeze(frozen, plan, 0, 0)

    def hold(self, step: int, owners: Owners) -> None:
        """The ``step``-th optimizer step has just moved these tensors, or all."""

    def silent(self, step: int) -> Tensor:
        """bool ``[num_channels]``: channels that put out exact zeros after this step."""
        return torch.zeros_like(self.lost)

    def still_since(self, dropped: Tensor) -> float:
        """The step since which none of these channels fades: -inf if they never did, inf if one
        has yet to begin."""
        return -math.inf


class Hold(Motion):
    """Frozen slices stay bit for bit.

    A channel that thaws starts with zero momentum and with the second moment it had when it froze:
    left alone, the second moment would decay while no gradient arrives, and the first steps after
    the thaw would be several times too large.
    """

    def __init__(self, stepping: Stepping, num_channels: int) -> None:
        super().__init__(num_channels)
        self._stepping = stepping
        self._plan: Plan | None = None
        self._held: list[_HeldSlices] | None = []

    def freeze(self, frozen: Tensor, plan: Plan, step: int, fade_steps: int) -> None:
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


class Fade(Hold):
    """What scales a channel goes to exact zero in N equal steps; everything else is held.

    Step a of N leaves (N - a) / N of the value at the start.  Geometric fades are unsafe: the norm
    amplifies a channel again however small its scale is, and a layer may come to live on its
    frozen channels alone.  Only exact zero is zero.  A channel whose fade has begun is lost.
    """

    def __init__(self, stepping: Stepping, network: nn.Module, groups: Groups) -> None:
        super().__init__(stepping, groups.num_channels)
        self._network = network
        self._groups = groups
        self._over_at = torch.zeros(groups.num_channels, dtype=torch.int64)
        self._fades: list[Fading] = []

    def freeze(self, frozen: Tensor, plan: Plan, step: int, fade_steps: int) -> None:
        super().freeze(frozen, plan, step, fade_steps)
        begins = frozen & ~self.lost
        if bool(begins.any()):
            self._begin(begins, step + fade_steps, fade_steps)

    def moving(self, frozen: Tensor) -> Collection[Tensor]:
        return self._scales(frozen).blocks.keys()

    def fades(self, step: int, ranks: Ranks) -> list[dict[str, Any]]:
        return [fading.state(step, ranks, self._names) for fading in self._fades]

    def resume(self, frozen: Tensor, plan: Plan, fades: Sequence[Mapping[str, Any]]) -> None:
        for fade in fades:
            channels = fade["channels"].to("cpu", copy=True)
            fading = self._begin(channels, fade["over_at"], fade["num_steps"])
            if fade["start"] is not None:
                names = self._names
                fading.start_from({p: fade["start"][names[p]] for p in fading.parameters})
        super().resume(frozen, plan, fades)

    def _begin(self, channels: Tensor, over_at: int, num_steps: int) -> Fading:
        self._over_at[channels] = over_at
        self.lost = self.lost | channels
        plan = self._scales(channels)
        fading = Fading(self._stepping, channels, plan, over_at, num_steps)
        self._fades.append(fading)
        return fading

    def _scales(self, channels: Tensor) -> Plan:
        """What scales these channels is frozen in it."""
        return Plan(self._network, self._groups, channels, "norm", untrained=True)

    @property
    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._network.named_parameters()}

    def before_step(self, penalty: float) -> None:
        super().before_step(penalty)
        for fading in self._fades:
            fading.start()

    def hold(self, step: int, owners: Owners) -> None:
        super().hold(step, owners)
        for fading in self._fades:
            fading.write(step, owners)

    def silent(self, step: int) -> Tensor:
        return self.lost & (self._over_at <= step)

    def still_since(self, dropped: Tensor) -> float:
        if not bool(dropped.any()):
            return -math.inf
        if not bool(self.lost[dropped].all()):
            return math.inf
        return int(self._over_at[dropped].max())


class Free(Motion):
    """Frozen slices get no data gradient, but the optimizer's momentum and decay still move them,
    and the penalty does, locally: what arrives through the loss is truncated with the rest."""

    def __init__(self, stepping: Stepping, network: nn.Module, groups: Groups) -> None:
        super().__init__(groups.num_channels)
        self._optimizer = stepping.optimizer
        parameters = dict(network.named_parameters())
        self._scales = {
            parameters[member.parameters[0][0]]
            for group in groups
            for member in group.norms + group.gates
        }
        self._frozen: Mapping[Tensor, Tensor] = {}

    def freeze(self, frozen: Tensor, plan: Plan, step: int, fade_steps: int) -> None:
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
