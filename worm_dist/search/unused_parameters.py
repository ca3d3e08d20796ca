"""Usage: which parameters took part in a forward pass."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import nn

__all__ = ["ParameterUsage"]


class ParameterUsage:
    """Notes which of some parameters the forward passes use.

    A wrapper that looks for unused parameters takes those that a forward pass leaves out for done
    before the backward pass begins, and does not bear it if a penalty hands them a gradient after
    all.

    Args:
        network: not wrapped.
        parameters: to look out for; direct ones of the modules that use them.
    """

    def __init__(self, network: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        self._seen: set[nn.Parameter] = set()
        wanted = set(parameters)
        # A hook goes where copies of its module go: the copies note into a set of their own.
        self._handles = [
            module.register_forward_hook(partial(_note, self._seen, mine))
            for module in network.modules()
            if (mine := wanted.intersection(module.parameters(recurse=False)))
        ]

    def take(self) -> set[nn.Parameter]:
        """The parameters used since the last call."""
        seen = set(self._seen)
        self._seen.clear()
        return seen

    def remove(self) -> None:
        """Note nothing from now on."""
        for handle in self._handles:
            handle.remove()


def _note(
    seen: set[nn.Parameter],
    mine: set[nn.Parameter],
    module: nn.Module,
    args: object,
    output: object,
) -> None:
    # What a test pass uses gets no gradient from it.
    if torch.is_grad_enabled():
        seen.update(mine)
