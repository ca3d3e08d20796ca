"""Gradient hooks: tensor hooks on parameters that truncate the gradients of frozen slices.

Used where no communication hook does it: on a bare network, and for soft truncation.  A tensor
hook receives the gradient of one backward pass before it is accumulated, so with gradient
accumulation each pass is truncated once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..groups.freeze_plan import Block, FreezePlan

__all__ = ["GradientHooks", "registered"]


class GradientHooks:
    """Multiplies the gradients of frozen slices by a ratio; 0 writes exact zeros."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def set_plan(self, plan: FreezePlan, ratio: float) -> None:
        """Use another plan and ratio from the next backward pass on."""
        self.remove()
        self._handles = [
            registered(parameter, _truncation(block, ratio))
            for parameter, block in plan.blocks.items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def registered(parameter: Tensor, hook: Callable[[Any], Tensor]) -> RemovableHandle:
    """Register a hook, also on a parameter that does not require gradients yet."""
    required_grad = parameter.requires_grad
    handle: RemovableHandle = parameter.requires_grad_(True).register_hook(hook)
    parameter.requires_grad_(required_grad)
    return handle


def _truncation(block: Block, ratio: float) -> Callable[[Tensor], Tensor]:
    def truncate(gradient: Tensor) -> Tensor:
        if ratio == 0:
            # Written, not multiplied: 0 x inf would be NaN.
            truncated = gradient.clone()
            for dim, frozen in block.frozen.items():
                truncated.index_fill_(dim, frozen, 0)
            return truncated
        assert len(block.frozen) == 1, "soft truncation applies to scales and shifts only"
        ((dim, frozen),) = block.frozen.items()
        factor = torch.ones(block.shape[dim], dtype=gradient.dtype, device=gradient.device)
        factor.index_fill_(0, frozen, ratio)
        return gradient * factor.view(-1, *[1] * (gradient.dim() - 1 - dim))

    return truncate
