"""Parameter storage: replaces the data of a parameter that stays the same object.

So its hooks and attributes stay, and references to it remain valid, such as in optimizers.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["replace_data"]


@torch.no_grad()
def replace_data(parameter: Tensor, value: Tensor) -> None:
    """Replace a parameter's value by one of any shape; its gradient is dropped.

    An autograd graph that is still referenced keeps the parameter's gradient accumulator, with the
    old shape.  torch creates a new accumulator when the dtype of the data changes, so it is changed
    back and forth.

    Args:
        parameter: the parameter, a leaf tensor.
        value: the new value, of the same dtype and device; its storage is shared, not copied.
    """
    parameter.grad = None
    other_dtype = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other_dtype, device=parameter.device)
    parameter.data = value.detach()
