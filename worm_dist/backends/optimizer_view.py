"""Stepping: which tensors an optimizer really steps, and when it does.

Usually these are the parameters.  Under ZeRO they are flat master copies, of which each rank steps
a part; what holds weights still and what carries the optimizer's state over must find them there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Handle", "OptimizerView", "Owners", "Shard"]

Owners: TypeAlias = Collection[Tensor] | None
"""Tensors that an optimizer has just stepped; None for all of its own."""


class Handle(Protocol):
    """Of something that can be taken away again."""

    def remove(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Shard:
    """Consecutive elements of one parameter, as this rank's optimizer steps them.

    Attributes:
        value: the elements; of the parameter's shape if these are all of it, else ``[elements]``.
        begin: place of the first one in the flattened parameter.
        owner: the tensor that the optimizer steps; ``value`` is a part of it.
        offset: place of the first one in the flattened owner.
    """

    value: Tensor
    begin: int
    owner: Tensor
    offset: int

    def moments(self, state: Mapping[str, object]) -> dict[str, Tensor]:
        """Of the owner's state what belongs to these elements one by one, as views that have the
        shape of ``value``."""
        return {
            key: tensor if self.value is self.owner else self._part(tensor)
            for key, tensor in state.items()
            if isinstance(tensor, Tensor) and tensor.shape == self.owner.shape
        }

    def _part(self, tensor: Tensor) -> Tensor:
        span = tensor.view(-1)[self.offset : self.offset + self.value.numel()]
        return span.view(self.value.shape)


class OptimizerView:
    """A torch optimizer that steps the parameters themselves.

    Attributes:
        optimizer: its state is where the moments are.
        copies: whether it steps copies of the parameters.
        shared: whether each rank steps only its part of them.
    """

    copies = False
    shared = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def groups(self) -> Sequence[Sequence[Tensor]]:
        """The network's parameters in each of the optimizer's groups."""
        return [group["params"] for group in self.optimizer.param_groups]

    @property
    def parameters(self) -> set[Tensor]:
        """All that are stepped, by this rank or another."""
        return {parameter for group in self.groups for parameter in group}

    def owner(self, parameter: Tensor) -> Tensor:
        """The tensor whose state in the optimizer is, or holds, this parameter's."""
        return parameter

    def shards(self, parameter: Tensor) -> Sequence[Shard]:
        """The parts of a parameter that this rank steps."""
        return (Shard(parameter, 0, parameter, 0),)

    def moments(self, shard: Shard) -> dict[str, Tensor]:
        """The optimizer's state of a shard, element by element."""
        return shard.moments(self.optimizer.state.get(shard.owner, {}))

    def listen(
        self,
        before: Callable[[], None],
        hold: Callable[[Owners], None],
        after: Callable[[], None],
    ) -> list[Handle]:
        """Call ``before`` and ``after`` every step, and ``hold`` as soon as weights have moved and
        before anything else is made of them; it may be called several times a step."""

        def stepped(*_: object) -> None:
            hold(None)
            after()

        return [
            self.optimizer.register_step_pre_hook(lambda *_: before()),
            self.optimizer.register_step_post_hook(stepped),
        ]
