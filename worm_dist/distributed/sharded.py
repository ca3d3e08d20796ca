"""Sharded tensors: what this rank has of a tensor that may be sharded (a DTensor)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_first_replica", "local"]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, differentiable; any other tensor unchanged."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part: Tensor = to_local()
    return part


def is_first_replica(tensor: Tensor) -> bool:
    """Whether no lower rank has the same part of a sharded tensor; True for any other tensor."""
    mesh = getattr(tensor, "device_mesh", None)
    # Replicas, if there are any, are in the first dimension of a mesh.
    return mesh is None or mesh.ndim == 1 or mesh.get_local_rank(0) == 0
