"""Unused parameters: records which parameters take part in forward passes."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import nn

__all__ = ["ParameterUsage"]


class ParameterUsage:
    """Records which of the given parameters the forward passes use.

    DDP with ``find_unused_parameters`` marks parameters that a forward pass leaves out as ready
    before the backward pass, and fails if a penalty gives them a gradient after all.

    Args:
        network: the unwrapped network.
        parameters: the parameters to observe, direct parameters of the modules that use them.
    """

    def __init__(self, network: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        self._used: set[nn.Parameter] = set()
        wanted = set(parameters)
        # Copies of the network copy the hooks with their set, so they record separately.
        self._handles = [
            module.register_forward_hook(partial(_record_use, self._used, own_parameters))
            for module in network.modules()
            if (own_parameters := wanted.intersection(module.parameters(recurse=False)))
        ]

    def take(self) -> set[nn.Parameter]:
        """Return the parameters used since the last call, and reset."""
        used = set(self._used)
        self._used.clear()
        return used

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _record_use(
    used: set[nn.Parameter],
    own_parameters: set[nn.Parameter],
    module: nn.Module,
    args: object,
    output: object,
) -> None:
    # Evaluation passes give no gradients.
    if torch.is_grad_enabled():
        used.update(own_parameters)
