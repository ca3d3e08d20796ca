"""Dependency graph of a network, based on torch-pruning (Fang et al., CVPR 2023).

Where operations move channels (flatten, shuffle, concatenation, split, slice, padding), their
indices are computed from the shapes that autograd recorded; torch-pruning guesses them from the
neighbouring layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch_pruning
from numpy.typing import NDArray
from torch import nn
from torch_pruning.ops import OPTYPE

from .reshapes import Rearrangement, normalized_dim, only_rearranges, op_name, shape_of

__all__ = ["Graph", "Ints", "Places", "moved"]

_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.PReLU,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)
_OPERATIONS = (
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.ELEMENTWISE,
    OPTYPE.RESHAPE,
    OPTYPE.UNBIND,
    OPTYPE.EXPAND,
    OPTYPE.SLICE,
)

Ints = NDArray[np.int64]


class Places(NamedTuple):
    """Indices along a tensor, and the channel at each of them.

    Attributes:
        indices: int64 ``[n]``.
        channels: int64 ``[n]``, the numbers of the channels.
    """

    indices: Ints
    channels: Ints


class _IndexMap(NamedTuple):
    """An index map from one side of an operation to the other, in the place of torch-pruning's.

    Attributes:
        move: a function from the places of channels on one side to those on the other.
    """

    move: Callable[[Places], Places]


class _Place(NamedTuple):
    """One index and its channel, with the field names of torch-pruning."""

    idx: int
    root_idx: int


def moved(places: Places, index_map: Any) -> Places:
    """Return the places of the same channels on the other side of an operation.

    Args:
        places: the places on this side.
        index_map: a map of a dependency, ours or torch-pruning's; None if indices stay the same.
    """
    if index_map is None:
        return places
    if isinstance(index_map, _IndexMap):
        return index_map.move(places)
    there = index_map([_Place(*pair) for pair in zip(*(each.tolist() for each in places))])
    return Places(_ints([place.idx for place in there]), _ints([place.root_idx for place in there]))


class Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]
    """A dependency graph that is only read; nothing is pruned with it.

    Args:
        queries: an iterator that is advanced at every query for a layer's width.  When it is
            exhausted, building fails: torch-pruning repeats queries in networks with many paths.

    Attributes:
        part_index: for each operation that treats channels in equal parts, a function from indices
            to those within their parts.  Channels with the same one must be removed together.
    """

    def __init__(self, queries: Iterator[int]) -> None:
        super().__init__()
        self._queries = queries
        self.part_index: dict[Any, Callable[[Ints], Ints]] = {}
        self._nodes: dict[Any, Any] = {}
        self._dims: dict[Any, int | None] = {}

    def get_out_channels(self, module_or_node: Any) -> Any:
        self._count_query()
        return super().get_out_channels(module_or_node)

    def get_in_channels(self, module_or_node: Any) -> Any:
        self._count_query()
        return super().get_in_channels(module_or_node)

    def _count_query(self) -> None:
        if next(self._queries, None) is None:
            raise TimeoutError("too many paths lead through it")

    def _build_dependency(self, module2node: dict[Any, Any]) -> None:
        super()._build_dependency(module2node)
        self._nodes = module2node
        moving: dict[str, Callable[[Any, int], bool]] = {
            "Cat": self._concatenate,
            "ConstantPadNd": self._pad,
            "Slice": self._slice,
            "Split": self._split,
            "SplitWithSizes": self._split,
        }
        for node in [node for node in module2node.values() if node.type in _OPERATIONS]:
            move = (
                self._rearrange if _ends_rearrangement(node) else moving.get(op_name(node.grad_fn))
            )
            dims = [dim for source in node.inputs if (dim := self._dim(source)) is not None]
            known = move is not None and bool(dims) and move(node, dims[0])
            if known or node.type == OPTYPE.RESHAPE:
                node.type = OPTYPE.ELEMENTWISE  # keeps torch-pruning from changing the maps again

    def _rearrange(self, node: Any, dim: int) -> bool:
        move = self._rearrangement(node)
        if move is not None and not move.is_identity:
            _set_input_maps(node, [(_from_table(move.indices), _from_table(move.channels))])
            if move.part_size:
                channels = _ints([channel for (channel,) in move.channels])
                self.part_index[node] = lambda indices: channels[indices] % move.part_size
        return True

    def _concatenate(self, node: Any, dim: int) -> bool:
        whole = shape_of(node.grad_fn)
        if normalized_dim(node.grad_fn._saved_dim, len(whole)) != dim:
            return True
        parts = node.grad_fn.next_functions
        # Tensors without gradient, such as the network's inputs, are not in the graph.
        sizes = [None if fn is None else shape_of(fn, number)[dim] for fn, number in parts]
        if sizes.count(None) > 1:
            return False
        rest = whole[dim] - sum(size or 0 for size in sizes)
        shifts = []
        start = 0
        for (fn, _), size in zip(parts, sizes):
            if fn is not None and getattr(fn, "variable", node.module) in self._nodes:
                shifts.append(_shift(start, size or 0))
            start += rest if size is None else size
        _set_input_maps(node, shifts)
        return True

    def _split(self, node: Any, dim: int) -> bool:
        pieces = [shape_of(node.grad_fn, n) for n in range(len(node.grad_fn._input_metadata))]
        if normalized_dim(node.grad_fn._saved_dim, len(pieces[0])) != dim:
            return True
        sizes = [piece[dim] for piece in pieces]
        shifts = [_shift(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
        reads = {
            reader: [n for fn, n in reader.grad_fn.next_functions if fn == node.grad_fn]
            for reader in node.outputs
        }
        if any(len(numbers) != node.outputs.count(reader) for reader, numbers in reads.items()):
            return False
        for reader, numbers in reads.items():
            edges = zip(_edges(node, reader), _edges(reader, node), numbers)
            for forth, back, number in edges:
                to_whole, to_piece = shifts[number]
                # Forward: from the whole to the piece, then through the reader's own map.
                # Backward: the reverse.
                forth.index_mapping[0] = to_piece
                back.index_mapping[1] = to_whole
        if op_name(node.grad_fn) == "Split" and len(set(sizes)) == 1:
            self.part_index[node] = lambda indices: indices % sizes[0]
        return True

    def _slice(self, node: Any, dim: int) -> bool:
        fn = node.grad_fn
        size, sliced_size = fn._saved_self_sym_sizes[dim], shape_of(fn)[dim]
        start, step = normalized_dim(fn._saved_start, size + 1), fn._saved_step
        if normalized_dim(fn._saved_dim, len(shape_of(fn))) == dim and sliced_size < size:

            def to_slice(places: Places) -> Places:
                there, off = np.divmod(places.indices - start, step)
                inside = (off == 0) & (there >= 0) & (there < sliced_size)
                return Places(there[inside], places.channels[inside])

            def to_whole(places: Places) -> Places:
                return Places(places.indices * step + start, places.channels)

            _set_input_maps(node, [(_IndexMap(to_slice), _IndexMap(to_whole))])
        return True

    def _pad(self, node: Any, dim: int) -> bool:
        shape, pad = shape_of(node.grad_fn), node.grad_fn._saved_pad
        behind = 2 * (len(shape) - 1 - dim)  # the last dimension comes first
        if behind < len(pad):
            before, after = pad[behind : behind + 2]
            _set_input_maps(node, [_shift(before, shape[dim] - before - after)])
        return True

    def _rearrangement(self, node: Any) -> Rearrangement | None:
        """Return the combined rearrangement of this operation and its direct predecessors; None if
        the channel dimension before them is unknown."""
        operations = [node.grad_fn]
        (source,) = node.inputs
        while _only_rearranges(source) and not _ends_rearrangement(source):
            operations.insert(0, source.grad_fn)
            (source,) = source.inputs
        dim = self._dim(source)
        if dim is None:
            return None
        fn, number = operations[0].next_functions[0]
        return Rearrangement.by(operations, shape_of(fn, number), dim)

    def _dim(self, node: Any) -> int | None:
        """Return the channel dimension of a node's output; None if unknown."""
        if node not in self._dims:
            self._dims[node] = None  # ends the recursion in loops, when a layer is used twice
            self._dims[node] = self._find_dim(node)
        return self._dims[node]

    def _find_dim(self, node: Any) -> int | None:
        if isinstance(node.module, _CHANNELS_SECOND):
            return 1
        if isinstance(node.module, _CHANNELS_LAST):
            return len(shape_of(node.grad_fn)) - 1
        if node.type not in _OPERATIONS:
            return None
        if _ends_rearrangement(node):
            move = self._rearrangement(node)
            return None if move is None else move.dim
        for source in node.inputs:
            dim = self._dim(source)
            if dim is not None:
                return _dim_after(node.grad_fn, source.grad_fn, dim)
        return None


def _only_rearranges(node: Any) -> bool:
    return node.type in _OPERATIONS and only_rearranges(node.grad_fn) and len(node.inputs) == 1


def _ends_rearrangement(node: Any) -> bool:
    """Whether an operation rearranges elements and at least one reader of its output does not."""
    return _only_rearranges(node) and not (
        node.outputs and all(map(_only_rearranges, node.outputs))
    )


def _dim_after(grad_fn: Any, source: Any, dim: int) -> int | None:
    """Return the dimension of ``dim`` after an operation that may reduce some dimensions.

    None if ``dim`` itself is reduced.
    """
    before, after = len(shape_of(source)), len(shape_of(grad_fn))
    if after >= before:
        return dim + after - before
    gone = getattr(grad_fn, "_saved_dim", ())
    gone = {
        normalized_dim(each, before) for each in (gone if isinstance(gone, Sequence) else (gone,))
    }
    return None if dim in gone else dim - sum(each < dim for each in gone)


def _shift(start: int, size: int) -> tuple[_IndexMap, _IndexMap]:
    """Return the index maps from a part to the whole and back."""

    def to_whole(places: Places) -> Places:
        return Places(places.indices + start, places.channels)

    def to_part(places: Places) -> Places:
        inside = (places.indices >= start) & (places.indices < start + size)
        return Places(places.indices[inside] - start, places.channels[inside])

    return _IndexMap(to_whole), _IndexMap(to_part)


def _from_table(table: Sequence[Sequence[int]]) -> _IndexMap:
    """Return a map that looks up indices in a table; -1, which is out of range, if missing."""
    rows = [*table, [-1]]
    sizes = _ints([len(row) for row in rows])
    ends = sizes.cumsum()
    flat = _ints([index for row in rows for index in row])

    def look_up(places: Places) -> Places:
        here = np.minimum(places.indices, len(table))
        repeats = sizes[here]
        # The n-th of all found indices, counted from the first one of its row.
        number = np.arange(repeats.sum()) - np.repeat(repeats.cumsum() - repeats, repeats)
        first = np.repeat(ends[here] - repeats, repeats)
        return Places(flat[first + number], np.repeat(places.channels, repeats))

    return _IndexMap(look_up)


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _set_input_maps(node: Any, moves: Sequence[tuple[_IndexMap, _IndexMap]]) -> None:
    """Set the index maps, forward and backward, between a node and each of its inputs."""
    numbers: dict[Any, int] = {}
    for source, (forth, back) in zip(node.inputs, moves, strict=True):
        number = numbers.get(source, 0)
        numbers[source] = number + 1
        _edges(source, node)[number].index_mapping[1] = forth
        _edges(node, source)[number].index_mapping[0] = back


def _edges(one: Any, other: Any) -> list[Any]:
    return [dependency for dependency in one.dependencies if dependency.target is other]
