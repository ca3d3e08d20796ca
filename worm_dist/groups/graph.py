"""Dependency graph of a network, based on torch-pruning (Fang et al., CVPR 2023).

Where operations move channels (flatten, shuffle, concatenation, split, slice, padding), their
indices are computed from the shapes that autograd recorded; torch-pruning guesses them from the
neighbouring layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch_pruning
from torch import nn
from torch_pruning.ops import OPTYPE

from .reshapes import Rearrangement, normalized_dim, only_rearranges, op_name, shape_of

__all__ = ["ChannelIndex", "Graph"]

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

_IndexMap = Callable[[int], Iterable[int]]
"""Map from an index to the indices of the same channel on the other side of an operation."""


class ChannelIndex(NamedTuple):
    """An index and the channel at it, with the field names of torch-pruning.

    Attributes:
        idx: the index in the current tensor.
        root_idx: the number of the channel.
    """

    idx: int
    root_idx: int


class Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]
    """A dependency graph that is only read; nothing is pruned with it.

    Args:
        queries: an iterator that is advanced at every query for a layer's width.  When it is
            exhausted, building fails: torch-pruning repeats queries in networks with many paths.

    Attributes:
        part_index: for each operation that treats channels in equal parts, a function from an index
            to the index within its part.  Channels with the same one must be removed together.
    """

    def __init__(self, queries: Iterator[int]) -> None:
        super().__init__()
        self._queries = queries
        self.part_index: dict[Any, Callable[[int], int]] = {}
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
                self.part_index[node] = lambda index: move.channels[index][0] % move.part_size
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
                forth.index_mapping[0] = _as_index_mapping(to_piece)
                back.index_mapping[1] = _as_index_mapping(to_whole)
        if op_name(node.grad_fn) == "Split" and len(set(sizes)) == 1:
            self.part_index[node] = lambda index: index % sizes[0]
        return True

    def _slice(self, node: Any, dim: int) -> bool:
        fn = node.grad_fn
        size, sliced_size = fn._saved_self_sym_sizes[dim], shape_of(fn)[dim]
        start, step = normalized_dim(fn._saved_start, size + 1), fn._saved_step
        if normalized_dim(fn._saved_dim, len(shape_of(fn))) == dim and sliced_size < size:

            def to_slice(index: int) -> Iterable[int]:
                there, off = divmod(index - start, step)
                return [there] if not off and 0 <= there < sliced_size else []

            _set_input_maps(node, [(to_slice, lambda index: [index * step + start])])
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

    def to_part(index: int) -> Iterable[int]:
        return [index - start] if start <= index < start + size else []

    return (lambda index: [index + start]), to_part


def _from_table(table: Sequence[Sequence[int]]) -> _IndexMap:
    """Return a map that looks up indices in a table; -1, which is out of range, if missing."""
    return lambda index: table[index] if index < len(table) else [-1]


def _set_input_maps(node: Any, moves: Sequence[tuple[_IndexMap, _IndexMap]]) -> None:
    """Set the index maps, forward and backward, between a node and each of its inputs."""
    numbers: dict[Any, int] = {}
    for source, (forth, back) in zip(node.inputs, moves, strict=True):
        number = numbers.get(source, 0)
        numbers[source] = number + 1
        _edges(source, node)[number].index_mapping[1] = _as_index_mapping(forth)
        _edges(node, source)[number].index_mapping[0] = _as_index_mapping(back)


def _edges(one: Any, other: Any) -> list[Any]:
    return [dependency for dependency in one.dependencies if dependency.target is other]


def _as_index_mapping(move: _IndexMap) -> Callable[[Iterable[Any]], list[ChannelIndex]]:
    def mapping(entries: Iterable[Any]) -> list[ChannelIndex]:
        return [ChannelIndex(index, each.root_idx) for each in entries for index in move(each.idx)]

    return mapping
