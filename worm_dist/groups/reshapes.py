"""Reshapes: the indices of channels after views, transposes and shuffles.

Instead of a rule for each operation, a tensor that holds the channel number of every element is
rearranged in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Rearrangement", "normalized_dim", "only_rearranges", "op_name", "shape_of"]


def op_name(grad_fn: Any) -> str:
    """Return autograd's name of an operation, such as ``View``; "" for custom functions."""
    name: str = grad_fn.name() if hasattr(grad_fn, "name") else ""
    return name.partition("Backward")[0]


def shape_of(grad_fn: Any, number: int = 0) -> tuple[int, ...]:
    """Return the shape of the ``number``-th output of an operation."""
    return tuple(grad_fn._input_metadata[number].shape)


def normalized_dim(dim: int, num_dims: int) -> int:
    """Normalise a dimension saved by autograd, which stores negative ones as unsigned 64-bit."""
    return (dim - 2**64 if dim >= 2**63 else dim) % num_dims


def only_rearranges(grad_fn: Any) -> bool:
    """Whether an operation only permutes or reshapes the elements of a tensor."""
    return op_name(grad_fn) in _OPERATIONS


class Rearrangement(NamedTuple):
    """The effect of a sequence of operations on the channels of a tensor.

    Attributes:
        dim: the channel dimension afterwards.
        indices: for every channel, its indices afterwards.
        channels: for every index afterwards, the channels at it.
        part_size: the number of channels in each part, if equal parts are shuffled; else 0.
    """

    dim: int
    indices: Sequence[Sequence[int]]
    channels: Sequence[Sequence[int]]
    part_size: int

    @property
    def is_identity(self) -> bool:
        return all(list(here) == [index] for index, here in enumerate(self.channels))

    @classmethod
    def by(cls, operations: Sequence[Any], shape: Sequence[int], dim: int) -> Rearrangement:
        """Compute the effect of operations on a tensor with this shape and channel dimension."""
        along = [1] * len(shape)
        along[dim] = shape[dim]
        numbers = torch.arange(shape[dim], dtype=torch.int32).view(along).expand(*shape)
        for grad_fn in operations:
            numbers = _OPERATIONS[op_name(grad_fn)](numbers, grad_fn)
        # Channels that become pixels vary along several dimensions; the first is the channels'.
        after = next((d for d in range(numbers.dim()) if _varies(numbers, d)), dim)
        after = min(after, numbers.dim() - 1)
        rows = numbers.movedim(after, 0).flatten(1)
        if rows.numel() and bool((rows == rows[:, :1]).all()):
            channels = rows[:, :1].tolist()
        else:
            channels = [row.unique().tolist() for row in rows]
        indices: list[list[int]] = [[] for _ in range(shape[dim])]
        for index, here in enumerate(channels):
            for channel in here:
                indices[channel].append(index)
        one_to_one = all(len(here) == 1 for here in (*indices, *channels))
        part_size = _part_size(operations[0], shape, dim) if one_to_one else 0
        return cls(after, indices, channels, part_size)


def _part_size(grad_fn: Any, shape: Sequence[int], dim: int) -> int:
    """Return the channels per part into which the operation splits ``dim``; 0 if there are none."""
    if hasattr(grad_fn, "_saved_groups"):
        return int(shape[dim] // grad_fn._saved_groups)
    parts = shape_of(grad_fn)[dim : dim + 2]
    return parts[1] if len(parts) == 2 and parts[0] * parts[1] == shape[dim] else 0


def _varies(numbers: Tensor, dim: int) -> bool:
    return bool((numbers != numbers.narrow(dim, 0, 1)).any())


def _reshaped(numbers: Tensor, grad_fn: Any) -> Tensor:
    return numbers.reshape(shape_of(grad_fn))


def _transposed(numbers: Tensor, grad_fn: Any) -> Tensor:
    dims = (
        normalized_dim(dim, numbers.dim()) for dim in (grad_fn._saved_dim0, grad_fn._saved_dim1)
    )
    return numbers.transpose(*dims)


def _permuted(numbers: Tensor, grad_fn: Any) -> Tensor:
    return numbers.permute([normalized_dim(dim, numbers.dim()) for dim in grad_fn._saved_dims])


_OPERATIONS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "View": _reshaped,
    "UnsafeView": _reshaped,
    "ReshapeAlias": _reshaped,
    "Clone": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Transpose": _transposed,
    "Permute": _permuted,
    "ChannelShuffle": lambda x, grad_fn: F.channel_shuffle(x, grad_fn._saved_groups),
    "NativeChannelShuffle": lambda x, grad_fn: F.channel_shuffle(x, grad_fn._saved_groups),
    "PixelShuffle": lambda x, grad_fn: F.pixel_shuffle(x, grad_fn._saved_upscale_factor),
    "PixelUnshuffle": lambda x, grad_fn: F.pixel_unshuffle(x, grad_fn._saved_downscale_factor),
}
