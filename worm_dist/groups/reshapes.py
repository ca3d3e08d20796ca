"""Rearrangement: where channels are after views, transposes and shuffles.

Rather than to know what each of these means for channels, the number of its channel is written at
every place of a tensor, and that tensor is rearranged in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Rearrangement", "kind_of", "rearranges", "shape_of", "wrapped"]


def kind_of(grad_fn: Any) -> str:
    """What autograd calls an operation, such as ``View``; empty for what is not its own."""
    name: str = grad_fn.name() if hasattr(grad_fn, "name") else ""
    return name.partition("Backward")[0]


def shape_of(grad_fn: Any, number: int = 0) -> tuple[int, ...]:
    """The shape of a tensor that an operation puts out."""
    return tuple(grad_fn._input_metadata[number].shape)


def wrapped(dim: int, num_dims: int) -> int:
    """A dimension as autograd keeps it, where negative ones are huge."""
    return (dim - 2**64 if dim >= 2**63 else dim) % num_dims


def rearranges(grad_fn: Any) -> bool:
    """Whether an operation only moves the elements of a tensor, each to one place."""
    return kind_of(grad_fn) in _OPERATIONS


class Rearrangement(NamedTuple):
    """What a few operations in a row do to the channels of a tensor.

    Attributes:
        dim: the dimension of the channels afterwards.
        places: for every channel the places where it is then.
        channels: for every place the channels that are there.
        in_parts_of: how many channels each part has, where equal parts are shuffled; else 0.
    """

    dim: int
    places: Sequence[Sequence[int]]
    channels: Sequence[Sequence[int]]
    in_parts_of: int

    @property
    def is_none(self) -> bool:
        return all(list(here) == [place] for place, here in enumerate(self.channels))

    @classmethod
    def by(cls, operations: Sequence[Any], shape: Sequence[int], dim: int) -> Rearrangement:
        """What the operations do to a tensor of this shape whose channels lie along ``dim``."""
        along = [1] * len(shape)
        along[dim] = shape[dim]
        numbers = torch.arange(shape[dim], dtype=torch.int32).view(along).expand(*shape)
        for grad_fn in operations:
            numbers = _OPERATIONS[kind_of(grad_fn)](numbers, grad_fn)
        # Where channels become pixels they vary along several; the first is what is left of them.
        after = next((d for d in range(numbers.dim()) if _varies(numbers, d)), dim)
        after = min(after, numbers.dim() - 1)
        rows = numbers.movedim(after, 0).flatten(1)
        channels = [row.unique().tolist() for row in rows]
        places: list[list[int]] = [[] for _ in range(shape[dim])]
        for place, here in enumerate(channels):
            for channel in here:
                places[channel].append(place)
        one_to_one = all(len(here) == 1 for here in (*places, *channels))
        in_parts_of = _part(operations[0], shape, dim) if one_to_one else 0
        return cls(after, places, channels, in_parts_of)


def _part(grad_fn: Any, shape: Sequence[int], dim: int) -> int:
    """Channels in each part that an operation begins to deal with; 0 if there are no parts."""
    if hasattr(grad_fn, "_saved_groups"):
        return int(shape[dim] // grad_fn._saved_groups)
    parts = shape_of(grad_fn)[dim : dim + 2]
    return parts[1] if len(parts) == 2 and parts[0] * parts[1] == shape[dim] else 0


def _varies(numbers: Tensor, dim: int) -> bool:
    return bool((numbers != numbers.narrow(dim, 0, 1)).any())


def _reshaped(numbers: Tensor, grad_fn: Any) -> Tensor:
    return numbers.reshape(shape_of(grad_fn))


def _transposed(numbers: Tensor, grad_fn: Any) -> Tensor:
    dims = (wrapped(dim, numbers.dim()) for dim in (grad_fn._saved_dim0, grad_fn._saved_dim1))
    return numbers.transpose(*dims)


def _permuted(numbers: Tensor, grad_fn: Any) -> Tensor:
    return numbers.permute([wrapped(dim, numbers.dim()) for dim in grad_fn._saved_dims])


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
