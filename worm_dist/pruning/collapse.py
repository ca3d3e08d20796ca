"""Collapse: a network whose output no longer depends on its input.

Rectifiers die when a large step pushes all that reaches them below zero; then no gradient comes
back, and nothing the optimizer does revives them.  The loss stays where a constant answer puts it.
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
    "go on from a checkpoint before that with a lower learning rate, search.prune_ratio or "
    "search.l1, or let channels leave more slowly (truncation.removal.duration)"
)
"""What to do about it."""

_TOLERANCE = 1e-6
"""Of the largest output: by how much outputs differ through rounding alone."""


class Liveness:
    """Watches forward passes: what reaches the layers behind each group, and what comes out.

    Synchronises nothing before ``require``.

    Args:
        network: not wrapped.
        groups: its channel groups.
    """

    def __init__(self, network: nn.Module, groups: Groups) -> None:
        self._groups = groups
        self._device = next(network.parameters()).device
        self._reached: dict[str, Tensor] = {}
        self._inputs = _Variation(self._device)
        self._outputs = _Variation(self._device)
        consumers = {member.module for group in groups for member in group.consumers}
        self._handles: list[RemovableHandle] = [
            network.get_submodule(name).register_forward_pre_hook(self._note(name))
            for name in sorted(consumers)
        ]

    def __enter__(self) -> Liveness:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen = (args[0] != 0).any()
                self._reached[name] = self._reached.get(name, torch.zeros_like(seen)) | seen

        return note

    def look(self, inputs: Any, output: Any) -> None:
        """What a pass was given, and what came out of it."""
        self._inputs.see(list(_tensors(inputs)))
        self._outputs.see(list(_tensors(output)))

    def require(self, ranks: Communicator, when: str, told: set[str]) -> None:
        """The network must answer.  Collective.

        Args:
            ranks: that train together; what one of them has seen counts for all.
            when: for messages.
            told: groups that have been warned of; those that are now are added.

        Raises:
            CollapseError: on every rank, if all outputs are the same.
        """
        reached = [self._reaches(self._readers(number)) for number in range(len(self._groups))]
        seen = torch.stack([self._inputs.varies, self._outputs.varies, *reached]).float()
        asked, answers, *alive = (ranks.mean(seen) > 0).tolist()
        names = [group.name for group in self._groups]
        dead = [name for name, lives in zip(names, alive, strict=True) if not lives]
        layers = f" Nothing but zeros comes from {_listed(dead)}." if dead else ""
        if asked and not answers:
            raise CollapseError(
                f"{when}: the network puts out the same whatever it is given.{layers} It will not "
                f"recover; {REMEDY}"
            )
        new = [name for name in dead if name not in told]
        if new and ranks.rank == 0:
            logger.warning(
                "%s: nothing but zeros comes from the channels that are left of %s; if the loss "
                "stays high, %s",
                when,
                _listed(new),
                REMEDY,
            )
        told.update(new)

    def _readers(self, number: int) -> Collection[str]:
        return {member.module for member in self._groups[number].consumers}

    def _reaches(self, readers: Collection[str]) -> Tensor:
        """Whether anything reached one of these; what is not called as a module is not known."""
        seen = [self._reached.get(reader) for reader in readers]
        known = [one for one in seen if one is not None]
        if len(known) < len(seen):
            return torch.ones((), dtype=torch.bool, device=self._device)
        return torch.stack(known).any()


class _Variation:
    """Whether tensors differ, within a batch or from pass to pass.

    Attributes:
        varies: a bool on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.varies = torch.zeros((), dtype=torch.bool, device=device)
        self._first: list[Tensor] = []

    def see(self, tensors: Sequence[Tensor]) -> None:
        """Those of one pass."""
        shapes = [tensor.shape for tensor in tensors]
        if shapes != [first.shape for first in self._first]:
            self._first = [tensor.clone() for tensor in tensors]
        for tensor, first in zip(tensors, self._first, strict=True):
            limit = _TOLERANCE * tensor.abs().max()
            for other in (first, *(tensor[:1] if tensor.dim() else ())):
                # Written so that a NaN varies: others look for those.
                self.varies |= ~((tensor - other).abs().max() <= limit)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All numbers in a nested value, as floats."""
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
