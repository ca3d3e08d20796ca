"""Blueprint: a network whose tensors take no memory, built from what a stranger's file says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError

__all__ = ["blueprint"]

_ALLOCATE = {torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.zeros}


def blueprint(build: Callable[[], nn.Module], limit: int) -> nn.Module:
    """Call ``build``; parameters and the buffers made like them are on the device ``meta``.

    Tensors that a constructor computes with (torchvision's RegNet takes its widths from some) are
    real, which they would not be under ``torch.device("meta")``.

    Args:
        limit: how many modules and parameters the network may have in all.

    Raises:
        ConfigError: it has more; it is given up on the way.
    """
    count = 0

    def one_more(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ConfigError(f"it has more than {limit} layers and parameters")

    hooks = (
        registration.register_module_module_registration_hook(one_more),
        registration.register_module_parameter_registration_hook(one_more),
    )
    try:
        with _WithoutMemory():
            return build()
    finally:
        for hook in hooks:
            hook.remove()


class _WithoutMemory(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if function in _ALLOCATE:
            given = {**given, "device": "meta"}
        return function(*args, **given)
