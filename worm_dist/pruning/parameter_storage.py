"""Storage: a parameter that becomes smaller stays the same object.

Its hooks, its attributes, and whatever refers to it go on with it: optimizers, lists made before,
averaged copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["replace_data"]


@torch.no_grad()
def replace_data(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter another value, of any shape; its gradient is dropped.

    Whoever keeps the graph of a pass keeps the node that accumulates the parameter's gradient, with
    the shape it had.  torch makes a new one when the type of the data changes, so it does, twice.

    Args:
        parameter: a leaf.
        value: of the same type and device; becomes the parameter's own.
    """
    parameter.grad = None
    elsewhere = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=elsewhere, device=parameter.device)
    parameter.data = value.detach()
