"""Snapshot: the state of networks and optimizers, to restore if a draw fails.

Tensors that a draw replaces are kept by reference.  Only buffers are copied, since statistics are
written in place; the dense tensors stay in memory until the draw is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..groups.parameter_storage import replace_data

__all__ = ["Snapshot"]

_TABLES = ("_parameters", "_buffers", "_modules")


def _hook_tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {key: v for key, v in vars(module).items() if "_hooks" in key and isinstance(v, dict)}


class Snapshot:
    """The state of networks and optimizers when it was made.

    Args:
        networks: bare networks, the trained one and its copies.
        optimizers: the optimizers of the trained one.
    """

    def __init__(self, networks: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        modules = {module: None for network in networks for module in network.modules()}
        self._modules = [(module, type(module), _attributes(module)) for module in modules]
        self._hooks = [
            (table, dict(table)) for module in modules for table in _hook_tables(module).values()
        ]
        self._parameters = [
            (parameter, parameter.data, parameter.grad, parameter.requires_grad)
            for network in networks
            for parameter in network.parameters()
        ]
        self._buffers: list[tuple[Tensor, Tensor]] = [
            (buffer, buffer.clone()) for network in networks for buffer in network.buffers()
        ]
        self._optimizers = [
            (
                optimizer,
                {key: dict(state) for key, state in optimizer.state.items()},
                [{**group, "params": list(group["params"])} for group in optimizer.param_groups],
            )
            for optimizer in optimizers
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything bit for bit, gradients and hooks included."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(
                {key: dict(v) if key in _TABLES else v for key, v in attributes.items()}
            )
        for table, hooks in self._hooks:  # in place: hook handles refer to the table
            table.clear()
            table.update(hooks)
        for parameter, data, gradient, trains in self._parameters:
            if parameter.data is not data:
                replace_data(parameter, data)
            parameter.grad = gradient
            parameter.requires_grad_(trains)
        for buffer, value in self._buffers:
            if not buffer.is_inference():  # tensors made in inference mode cannot be written to
                buffer.copy_(value)
        for optimizer, states, groups in self._optimizers:
            optimizer.state.clear()
            for key, state in states.items():
                optimizer.state[key] = dict(state)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update({**before, "params": list(before["params"])})


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: dict(value) if key in _TABLES else value for key, value in module.__dict__.items()}
