"""The gradient of a parameter that has one."""

from __future__ import annotations

from torch import Tensor

__all__ = ["gradient"]


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
