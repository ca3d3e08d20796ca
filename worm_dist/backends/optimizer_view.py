"""Optimizer view: the tensors that an optimizer really steps, and hooks around its steps.

Usually these tensors are the parameters.  Under ZeRO they are flat master copies, of which each
rank steps one partition; held weights are restored and optimizer state is transferred there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Handle", "OptimizerView", "Owners", "Shard", "StepListener"]

Owners: TypeAlias = Collection[Tensor] | None
"""Tensors that the optimizer has just stepped; None for all of its tensors."""


class Handle(Protocol):
    """Something registered that can be removed again."""

    def remove(self) -> None: ...


class StepListener:
    """Base of everything that acts around an optimizer step; by default it does nothing."""

    def before_step(self) -> None:
        """Called before an optimizer step."""

    def hold(self, step: int, owners: Owners) -> None:
        """Called right after the ``step``-th step has changed ``owners``, before they are used or
        copied; possibly several times per step."""

    def after_step(self, step: int) -> None:
        """Called after the ``step``-th step."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Consecutive elements of one parameter, as this rank's optimizer steps them.

    Attributes:
        value: the elements: of the parameter's shape if it is complete, or has whole rows of it;
            else ``[elements]``.
        begin: index of the first element in the flattened parameter.
        owner: the tensor that the optimizer steps; ``value`` is a view of it.
        offset: index of the first element in the flattened owner.
    """

    value: Tensor
    begin: int
    owner: Tensor
    offset: int

    def moments(self, state: Mapping[str, object]) -> dict[str, Tensor]:
        """The per-element entries of the owner's optimizer state, restricted to this shard: views
        of the shape of ``value``."""
        return {
            key: tensor if self.value is self.owner else self._part(tensor)
            for key, tensor in state.items()
            if isinstance(tensor, Tensor) and tensor.shape == self.owner.shape
        }

    def _part(self, tensor: Tensor) -> Tensor:
        span = tensor.view(-1)[self.offset : self.offset + self.value.numel()]
        return span.view(self.value.shape)


class OptimizerView:
    """View of a torch optimizer that steps the parameters themselves.

    Attributes:
        optimizer: the torch optimizer that holds the state.
        copies: whether it steps copies of the parameters (master weights).
        shared: whether its state is sharded: each rank steps only its part.
    """

    copies = False
    shared = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        """The network's parameters in each of the optimizer's parameter groups."""
        return [group["params"] for group in self.optimizer.param_groups]

    @property
    def parameters(self) -> set[Tensor]:
        """All parameters that are stepped, on this rank or another."""
        return {parameter for group in self.groups for parameter in group}

    def owner(self, parameter: Tensor) -> Tensor:
        """The tensor under which the optimizer keeps this parameter's state."""
        return parameter

    def options(self, owner: Tensor) -> dict[str, Any]:
        """The options of the parameter group of an owner."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return next(group for group in groups if any(p is owner for p in group["params"]))

    def weights(self, parameter: Tensor, shard: Shard) -> Tensor:
        """A shard's elements of the parameter itself, of the shape of its value."""
        value = parameter.detach()
        if shard.value.shape == value.shape:
            return value
        return value.reshape(-1)[shard.begin :][: shard.value.numel()]

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        """The shards of a parameter that this rank steps."""
        return (Shard(parameter, 0, parameter, 0),)

    def moments(self, shard: Shard) -> dict[str, Tensor]:
        """The per-element optimizer state of a shard; see ``Shard.moments``."""
        return shard.moments(self.optimizer.state.get(shard.owner, {}))

    def register_hooks(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        """Register hooks around every optimizer step.

        Args:
            before: called before the step; if a closure computes its gradients, after the closure.
            hold: called with the stepped tensors right after they have changed and before they
                are used or copied; possibly several times per step.
            after: called after the step.
        """

        def stepping(_: object, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            # The arguments begin with the optimizer.
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                before()
                return None

            def closure_and_before() -> Any:
                loss = closure()
                before()
                return loss

            return args[:1], {**kwargs, "closure": closure_and_before}

        def stepped(*_: object) -> None:
            hold(None)
            after()

        return [
            self.optimizer.register_step_pre_hook(stepping),
            self.optimizer.register_step_post_hook(stepped),
        ]
