"""Full shape: the shape of a parameter, whether its elements are here or spread over the ranks.

Under DeepSpeed's ZeRO stage 3 a parameter is empty except while a layer that uses it runs;
DeepSpeed keeps its shape in an attribute.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["full_numel", "full_shape", "is_sharded", "shaped_like"]


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_numel(parameter: Tensor) -> int:
    """The number of elements of the whole parameter."""
    return full_shape(parameter).numel()


def is_sharded(parameter: Tensor) -> bool:
    """Whether every rank holds a part of the parameter only."""
    return hasattr(parameter, "ds_shape") or type(parameter).__name__ == "DTensor"


def shaped_like(parameter: Tensor) -> Tensor:
    """A tensor with the shape and strides of the whole parameter, perhaps without data."""
    if hasattr(parameter, "ds_shape"):
        return torch.empty(full_shape(parameter), dtype=parameter.dtype, device="meta")
    return parameter.detach()
