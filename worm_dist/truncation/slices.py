"""Slices: the frozen slices of many tensors, copied and written back in few operations.

A network has far more small tensors than large ones, and three operations do for all of them:
concatenate, write the slices by one index, copy back.  Large tensors are written by rows and
columns, each alone: to copy them whole would take longer than the additional operations, and an
index of eight bytes for each of their elements would take more memory than they do.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..backends.optimizer_view import Shard
from ..comm_hooks.wide_rows import row_writer
from ..groups.freeze_plan import Block

__all__ = ["ManySlices", "RepeatedWrite", "SliceCopies", "Slices", "group_slices"]

_MERGED_ON_CPU, _MERGED = 2**12, 2**20
"""Elements from which on a tensor is written alone.  Operations cost more on accelerators."""
_MOST_AT_ONCE = 2**22
"""Elements of tensors that are concatenated at once, together with as many of each of their
moments: the size of a temporary tensor."""

SliceCopies: TypeAlias = Sequence[Tensor]
"""Copies of frozen slices, as ``Slices.take`` returns them."""

Written: TypeAlias = tuple[Sequence[Tensor | None], SliceCopies | None]
"""Tensors, and the copies that are written to their slices; zeros if there are none."""


class Slices(Protocol):
    """The frozen slices of tensors of certain shapes: of shards, or of their optimizer state, which
    may be missing (None)."""

    @property
    def num_copied(self) -> int:
        """Number of elements of what ``take`` returns."""

    @property
    def num_indices(self) -> int:
        """Number of indices that are kept, each of eight bytes, besides those of the blocks."""

    def take(self, tensors: Sequence[Tensor | None]) -> SliceCopies | None:
        """Copies of the slices, of zeros for missing tensors; None if all are missing."""

    def writer(self, together: Sequence[Written]) -> Callable[[], None]:
        """A function that writes to the slices of all these tensors what the copies have then."""


class ManySlices:
    """The frozen slices of many small tensors of one dtype.

    Args:
        blocks: the live and frozen slices of each.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._sizes = [block.shape.numel() for block in blocks]
        self._num_frozen = [size - block.num_live for size, block in zip(self._sizes, blocks)]
        self._indices: dict[tuple[object, ...], Tensor] = {}

    @property
    def num_copied(self) -> int:
        return sum(self._num_frozen)

    @property
    def num_indices(self) -> int:
        """See ``Slices``; as many again for tensors with other strides."""
        return sum(self._num_frozen)

    def take(self, tensors: Sequence[Tensor | None]) -> SliceCopies | None:
        like = next((tensor for tensor in tensors if tensor is not None), None)
        if like is None:
            return None
        filled = [
            like.new_zeros(block.shape) if tensor is None else tensor
            for tensor, block in zip(tensors, self._blocks, strict=True)
        ]
        flat = torch.cat([_in_memory_order(tensor) for tensor in filled])
        return (flat.index_select(0, self._index(range(len(filled)), filled)),)

    def writer(self, together: Sequence[Written]) -> Callable[[], None]:
        # Those of one dtype are written together.
        alike: dict[torch.dtype, tuple[list[Tensor], list[_Part]]] = {}
        for tensors, copies in together:
            there = [number for number, tensor in enumerate(tensors) if tensor is not None]
            if there:
                present = [tensor for tensor in tensors if tensor is not None]
                views, parts = alike.setdefault(present[0].dtype, ([], []))
                views += map(_in_memory_order, present)
                chosen = None if copies is None else self._chosen(copies, there)
                num_elements = sum(self._sizes[number] for number in there)
                parts.append((self._index(there, present), chosen, num_elements))

        def write() -> None:
            for views, parts in alike.values():
                _write_together(views, parts)

        return write

    def _chosen(self, copies: SliceCopies, there: Sequence[int]) -> Tensor:
        (taken,) = copies
        if len(there) == len(self._blocks):
            return taken.reshape(-1)
        parts = taken.split(self._num_frozen)
        return torch.cat([parts[number] for number in there])

    def _index(self, there: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        """int64: where the slices are in the concatenation of these tensors, in memory order."""
        # A loaded momentum may have other strides than its parameter, whose format it loses.
        key = (*there, *(tensor.stride() for tensor in tensors))
        if key not in self._indices:
            offset, indices = 0, []
            for number, tensor in zip(there, tensors, strict=True):
                indices.append(self._blocks[number].frozen_elements(tensor.stride()) + offset)
                offset += tensor.numel()
            self._indices[key] = torch.cat(indices)
        return self._indices[key]


class RowSlices:
    """The frozen rows and columns of one tensor.

    Args:
        block: its live and frozen slices.
    """

    def __init__(self, block: Block) -> None:
        self._frozen = block.frozen
        self._shape = block.shape

    @property
    def num_copied(self) -> int:
        """See ``Slices``; elements in frozen rows and columns are copied twice."""
        return sum(
            self._shape.numel() // self._shape[dim] * indices.numel()
            for dim, indices in self._frozen.items()
        )

    @property
    def num_indices(self) -> int:
        return 0

    def take(self, tensors: Sequence[Tensor | None]) -> SliceCopies | None:
        (tensor,) = tensors
        if tensor is None:
            return None
        return [tensor.index_select(dim, indices) for dim, indices in self._frozen.items()]

    def writer(self, together: Sequence[Written]) -> Callable[[], None]:
        writers: list[Callable[[], object]] = []
        for (tensor,), copies in together:
            for number, (dim, indices) in enumerate(self._frozen.items()):
                values = None if copies is None else copies[number]
                if tensor is None:
                    continue
                if dim == 0:
                    writers.append(row_writer(tensor, indices, values))
                elif values is None:
                    writers.append(partial(tensor.index_fill_, dim, indices, 0))
                else:
                    writers.append(partial(tensor.index_copy_, dim, indices, values))

        def write() -> None:
            for each in writers:
                each()

        return write


class RepeatedWrite:
    """Writes copies to the slices of the same tensors after every step.

    Views and indices are kept for as long as the tensors stay the same, and where they are in
    memory; loading an optimizer's state replaces its tensors.

    Args:
        slices: the slices.
    """

    def __init__(self, slices: Slices) -> None:
        self._slices = slices
        self._tensors: list[Tensor | None] = []
        self._addresses: list[int] = []
        self._write: Callable[[], None] = lambda: None

    def __call__(self, together: Sequence[Written]) -> None:
        """Write.

        Args:
            together: tensors with their copies, which are the same for the same tensors; what the
                copies have may change.
        """
        tensors = [tensor for each, _ in together for tensor in each]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses or not all(map(operator.is_, tensors, self._tensors)):
            self._tensors, self._addresses = tensors, addresses
            self._write = self._slices.writer(together)
        self._write()


def group_slices(
    items: Iterable[tuple[Shard, Block]],
) -> list[tuple[list[Shard], Slices]]:
    """Group shards whose frozen slices are written together.

    Args:
        items: shards, each with the live and frozen slices of its parameter.
    """
    alone: list[tuple[list[Shard], Slices]] = []
    together: dict[object, list[tuple[Shard, Block]]] = defaultdict(list)
    for shard, block in items:
        value = shard.value
        part = block.of_shard(shard.begin, value.shape)
        is_dense = bool(torch.ops.aten.is_non_overlapping_and_dense(value))
        limit = _MERGED_ON_CPU if value.device.type == "cpu" else _MERGED
        if value.numel() >= limit or not is_dense:
            alone.append(([shard], RowSlices(part)))
        else:
            # An optimizer may step and use one flat copy of a parameter group before another.
            owner = None if value is shard.owner else id(shard.owner)
            together[value.dtype, value.device, owner].append((shard, part))
    return alone + [
        ([shard for shard, _ in chunk], ManySlices([block for _, block in chunk]))
        for same in together.values()
        for chunk in _chunks(same)
    ]


def _chunks(items: Sequence[tuple[Shard, Block]]) -> list[list[tuple[Shard, Block]]]:
    chunks: list[list[tuple[Shard, Block]]] = [[]]
    size = 0
    for shard, block in items:
        if size and size + shard.value.numel() > _MOST_AT_ONCE:
            chunks.append([])
            size = 0
        chunks[-1].append((shard, block))
        size += shard.value.numel()
    return chunks


_Part: TypeAlias = tuple[Tensor, Tensor | None, int]
"""Of a part of a concatenation: the index of the slices, what is written there, or None for zeros,
and the number of elements."""


def _write_together(views: list[Tensor], parts: Sequence[_Part]) -> None:
    """Write to slices in the concatenation of one-dimensional views, in as many parts, and copy it
    back."""
    flat = torch.cat(views)
    begin = 0
    for index, values, size in parts:
        part = flat[begin : begin + size]
        if values is None:
            part.index_fill_(0, index, 0)
        else:
            # ``index_copy_`` does the same, but takes twice as long on a CPU.
            part.scatter_(0, index, values)
        begin += size
    torch._foreach_copy_(views, flat.split([view.numel() for view in views]))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
