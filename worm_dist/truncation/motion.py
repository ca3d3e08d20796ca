"""Motion: what frozen slices do instead of training, whatever the optimizer does.

A zero gradient alone does not keep a weight still: momentum and weight decay go on moving it.  So
after every optimizer step the frozen slices are written back.  All rules are local and
deterministic; no rank needs to be told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..search.groups import Groups
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

    def before_step(self, penalty: float) -> None:
        """Just before an optimizer step; ``penalty`` is the weight of the L1 on the scales."""

    def after_step(self, step: int) -> None:
        """Just after an optimizer step, the ``step``-th."""

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

    def __init__(self, optimizer: Optimizer, num_channels: int) -> None:
        super().__init__(num_channels)
        self._optimizer = optimizer
        self._held: list[_HeldSlices] = []

    def freeze(self, frozen: Tensor, plan: Plan, step: int, fade_steps: int) -> None:
        self._held = [
            _HeldSlices(parameter, block, self._optimizer.state.get(parameter, {}))
            for parameter, block in plan.blocks.items()
        ]

    def after_step(self, step: int) -> None:
        for slices in self._held:
            slices.restore(self._optimizer.state.get(slices.parameter, {}))


class Fade(Hold):
    """Scale and shift go to exact zero in N equal steps; everything else is held.

    Step a of N leaves (N - a) / N of the value at the start.  Geometric fades are unsafe: the norm
    amplifies a channel again however small its scale is, and a layer may come to live on its
    frozen channels alone.  Only exact zero is zero.  A channel whose fade has begun is lost.
    """

    def __init__(self, optimizer: Optimizer, network: nn.Module, groups: Groups) -> None:
        super().__init__(optimizer, groups.num_channels)
        self._over_at = torch.zeros(groups.num_channels, dtype=torch.int64)
        self._groups = groups
        parameters = dict(network.named_parameters())
        self._fading = {
            name: _FadingVector(parameters[name])
            for group in groups
            for norm in group.norms
            for name, _ in norm.parameters
        }

    def freeze(self, frozen: Tensor, plan: Plan, step: int, fade_steps: int) -> None:
        super().freeze(frozen, plan, step, fade_steps)
        begins = frozen & ~self.lost
        if not bool(begins.any()):
            return
        self._over_at[begins] = step + fade_steps
        self.lost = self.lost | begins
        for group, here in zip(self._groups, self._groups.split(begins).values(), strict=True):
            for norm in group.norms:
                for name, _ in norm.parameters:
                    self._fading[name].begin(norm.positions[here].flatten(), step, fade_steps)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        for vector in self._fading.values():
            vector.write(step)

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

    def __init__(self, optimizer: Optimizer, network: nn.Module, groups: Groups) -> None:
        super().__init__(groups.num_channels)
        self._optimizer = optimizer
        parameters = dict(network.named_parameters())
        self._scales = {parameters[n.parameters[0][0]] for group in groups for n in group.norms}
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
    """The frozen slices of one parameter and of its optimizer state, as they were."""

    @torch.no_grad()
    def __init__(self, parameter: Tensor, block: Block, state: Mapping[str, object]) -> None:
        self.parameter = parameter
        self._places = block.frozen
        self._values = self._copy(parameter)
        self._moments = {
            key: self._copy(value)
            for key, value in state.items()
            if self._follows(value) and key not in _FIRST_MOMENTS
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, object]) -> None:
        self._write(self.parameter, self._values)
        for key, value in state.items():
            if self._follows(value):
                self._write(value, self._moments.get(key, {}))

    def _follows(self, value: object) -> bool:
        """Whether a piece of optimizer state belongs to the parameter element by element."""
        return isinstance(value, Tensor) and value.shape == self.parameter.shape

    def _copy(self, tensor: object) -> dict[int, Tensor]:
        assert isinstance(tensor, Tensor)
        return {dim: tensor.index_select(dim, at) for dim, at in self._places.items()}

    def _write(self, tensor: object, values: Mapping[int, Tensor]) -> None:
        """Put slices back; where there are none, zeros."""
        assert isinstance(tensor, Tensor)
        for dim, places in self._places.items():
            if dim in values:
                tensor.index_copy_(dim, places, values[dim])
            else:
                tensor.index_fill_(dim, places, 0)


class _FadingVector:
    """One scale or shift vector ``[features]``, parts of which fade."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._start = torch.zeros_like(parameter, dtype=torch.float32)
        self._over_at = torch.zeros_like(parameter, dtype=torch.int64)
        self._num_steps = torch.ones_like(parameter, dtype=torch.int64)
        self._fades = torch.zeros_like(parameter, dtype=torch.bool)

    @torch.no_grad()
    def begin(self, places: Tensor, step: int, num_steps: int) -> None:
        places = places.to(self._parameter.device)
        self._start[places] = self._parameter[places].float()
        self._over_at[places] = step + num_steps
        self._num_steps[places] = num_steps
        self._fades[places] = True

    @torch.no_grad()
    def write(self, step: int) -> None:
        # Elementwise on the whole vector: no index, no synchronisation, a few thousand elements.
        left = (self._over_at - step).clamp_(min=0) / self._num_steps
        value = (self._start * left).to(self._parameter.dtype)
        self._parameter.copy_(torch.where(self._fades, value, self._parameter))
