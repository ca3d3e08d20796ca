"""Sharded tensors: what this rank has of a tensor that may be sharded (a DTensor)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["local"]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, differentiable; any other tensor unchanged."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part: Tensor = to_local()
    return part
