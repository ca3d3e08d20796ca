"""Collapse detection: a network whose output no longer depends on its input.

If a large step makes all inputs of a ReLU negative, its gradient is zero and the optimizer cannot
recover it ("dying ReLU").  The loss then stays at that of a constant output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..distributed.collectives import Communicator
from ..errors import CollapseError
from ..groups.channel_groups import Groups

__all__ = ["REMEDY", "Liveness"]

logger = logging.getLogger(__name__)

REMEDY = (
    "resume from an earlier checkpoint with a lower learning rate, search.prune_ratio or "
    "search.l1, or remove channels more slowly (truncation.removal.duration)"
)
"""Advice for messages about a collapse."""

_TOLERANCE = 1e-6
"""The difference of outputs, relative to the largest one, that rounding alone can cause."""


class Liveness:
    """Observes in forward passes whether each group's consumers get nonzero inputs, and whether
    inputs and outputs vary.

    Nothing is synchronised with the host before ``require``.

    Args:
        network: the unwrapped network.
        groups: the network's channel groups.
    """

    def __init__(self, network: nn.Module, groups: Groups) -> None:
        self._groups = groups
        self._device = next(network.parameters()).device
        self._reached: dict[str, Tensor] = {}
        self._inputs = _Variation(self._device)
        self._outputs = _Variation(self._device)
        consumers = {member.module for group in groups for member in group.consumers}
        self._handles: list[RemovableHandle] = [
            network.get_submodule(name).register_forward_pre_hook(self._recorder(name))
            for name in sorted(consumers)
        ]

    def __enter__(self) -> Liveness:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                nonzero = (args[0] != 0).any()
                self._reached[name] = self._reached.get(name, torch.zeros_like(nonzero)) | nonzero

        return record

    def observe(self, inputs: Any, output: Any) -> None:
        """Record the inputs and outputs of one forward pass."""
        self._inputs.update(list(_tensors(inputs)))
        self._outputs.update(list(_tensors(output)))

    def require(self, ranks: Communicator, when: str, warned: set[str]) -> None:
        """Check that outputs depend on inputs, and warn of groups with zero output.  Collective.

        Args:
            ranks: the communicator of the training ranks; an observation on one counts for all.
            when: the operation, as a prefix of messages.
            warned: the names of groups already warned about; newly reported ones are added.

        Raises:
            CollapseError: on every rank, if inputs vary but all outputs are equal.
        """
        reached = [self._reaches(self._readers(number)) for number in range(len(self._groups))]
        seen = torch.stack([self._inputs.varies, self._outputs.varies, *reached]).float()
        inputs_vary, outputs_vary, *nonzero = (ranks.mean(seen) > 0).tolist()
        names = [group.name for group in self._groups]
        all_zero = [name for name, is_nonzero in zip(names, nonzero, strict=True) if not is_nonzero]
        layers = f" Nothing but zeros comes from {_listed(all_zero)}." if all_zero else ""
        if inputs_vary and not outputs_vary:
            raise CollapseError(
                f"{when}: the network's output no longer depends on its input.{layers} It will not "
                f"recover; {REMEDY}"
            )
        new = [name for name in all_zero if name not in warned]
        if new and ranks.rank == 0:
            logger.warning(
                "%s: the remaining channels of %s are all zero; if the loss stays high, %s",
                when,
                _listed(new),
                REMEDY,
            )
        warned.update(new)

    def _readers(self, number: int) -> Collection[str]:
        return {member.module for member in self._groups[number].consumers}

    def _reaches(self, readers: Collection[str]) -> Tensor:
        """Whether a layer got a nonzero input; True if one of them was not called as a module."""
        seen = [self._reached.get(reader) for reader in readers]
        known = [one for one in seen if one is not None]
        if len(known) < len(seen):
            return torch.ones((), dtype=torch.bool, device=self._device)
        return torch.stack(known).any()


class _Variation:
    """Whether tensors differ within a batch or between passes.

    Attributes:
        varies: a scalar bool tensor on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.varies = torch.zeros((), dtype=torch.bool, device=device)
        self._first: list[Tensor] = []

    def update(self, tensors: Sequence[Tensor]) -> None:
        """Compare the tensors of one pass with each other and with the first pass."""
        shapes = [tensor.shape for tensor in tensors]
        if shapes != [first.shape for first in self._first]:
            self._first = [tensor.clone() for tensor in tensors]
        for tensor, first in zip(tensors, self._first, strict=True):
            limit = _TOLERANCE * tensor.abs().max()
            for other in (first, *(tensor[:1] if tensor.dim() else ())):
                # Written so that NaN counts as varying; NaN is detected elsewhere.
                self.varies |= ~((tensor - other).abs().max() <= limit)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the non-empty real tensors in a nested value, as float32."""
    if isinstance(value, Tensor):
        if value.numel() and not value.is_complex():
            yield value.detach().float()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
