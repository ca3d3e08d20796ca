"""Meta initialisation: builds a network without memory for its tensors, for untrusted tickets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError

__all__ = ["build_on_meta"]

_ALLOCATE = {torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.zeros}


def build_on_meta(build: Callable[[], nn.Module], limit: int) -> nn.Module:
    """Call ``build`` with parameters and newly allocated buffers on the device ``meta``.

    Tensors that a constructor computes with stay real, unlike under ``torch.device("meta")``;
    torchvision's RegNet, for example, computes its widths with tensors.

    Args:
        build: a function that returns the network.
        limit: the largest total number of modules and parameters.

    Raises:
        ConfigError: the network has more; construction stops at that point.
    """
    count = 0

    def count_registration(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ConfigError(f"it has more than {limit} layers and parameters")

    hooks = (
        registration.register_module_module_registration_hook(count_registration),
        registration.register_module_parameter_registration_hook(count_registration),
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
