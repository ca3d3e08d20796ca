"""Graph: torch-pruning's dependency graph of a network (Fang et al., CVPR 2023).

Where channels move, behind a flatten, a shuffle, a concatenation, a split, a slice or a padding,
their places are taken from the shapes that autograd has seen; torch-pruning guesses them from the
layers around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch_pruning
from torch import nn
from torch_pruning.ops import OPTYPE

from .reshapes import Rearrangement, kind_of, rearranges, shape_of, wrapped

__all__ = ["Graph", "Spot"]

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

_Move = Callable[[int], Iterable[int]]
"""From a place to those where the channel is on the other side of an operation."""


class Spot(NamedTuple):
    """A channel at a place, by the names that torch-pruning uses."""

    idx: int
    root_idx: int


class Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]
    """Only to be looked at: nothing is pruned with it.

    Args:
        questions: one is taken for every question for a width; when they are at an end, so is the
            patience: torch-pruning asks again and again where a network has many ways.

    Attributes:
        alike: of operations that deal with channels in equal parts, the number of a place within
            its part: only if the parts lose the same do they stay equal.
    """

    def __init__(self, questions: Iterator[int]) -> None:
        super().__init__()
        self._questions = questions
        self.alike: dict[Any, Callable[[int], int]] = {}
        self._nodes: dict[Any, Any] = {}
        self._dims: dict[Any, int | None] = {}

    def get_out_channels(self, module_or_node: Any) -> Any:
        self._ask()
        return super().get_out_channels(module_or_node)

    def get_in_channels(self, module_or_node: Any) -> Any:
        self._ask()
        return super().get_in_channels(module_or_node)

    def _ask(self) -> None:
        if next(self._questions, None) is None:
            raise TimeoutError("too many ways lead through it")

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
            move = self._rearrange if _ends_moves(node) else moving.get(kind_of(node.grad_fn))
            dims = [dim for source in node.inputs if (dim := self._dim(source)) is not None]
            known = move is not None and bool(dims) and move(node, dims[0])
            if known or node.type == OPTYPE.RESHAPE:
                node.type = OPTYPE.ELEMENTWISE  # torch-pruning does not look at it again

    def _rearrange(self, node: Any, dim: int) -> bool:
        move = self._rearrangement(node)
        if move is not None and not move.is_none:
            _moves_in(node, [(_looked_up(move.places), _looked_up(move.channels))])
            if move.in_parts_of:
                self.alike[node] = lambda place: move.channels[place][0] % move.in_parts_of
        return True

    def _concatenate(self, node: Any, dim: int) -> bool:
        whole = shape_of(node.grad_fn)
        if wrapped(node.grad_fn._saved_dim, len(whole)) != dim:
            return True
        parts = node.grad_fn.next_functions
        # What needs no gradient is not in the graph, such as what the network takes in.
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
        _moves_in(node, shifts)
        return True

    def _split(self, node: Any, dim: int) -> bool:
        pieces = [shape_of(node.grad_fn, n) for n in range(len(node.grad_fn._input_metadata))]
        if wrapped(node.grad_fn._saved_dim, len(pieces[0])) != dim:
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
            ways = zip(_ways(node, reader), _ways(reader, node), numbers)
            for forth, back, number in ways:
                to_whole, to_piece = shifts[number]
                # Forth: out of the whole, then to wherever the reader puts it.  Back: the reverse.
                forth.index_mapping[0] = _applied(to_piece)
                back.index_mapping[1] = _applied(to_whole)
        if kind_of(node.grad_fn) == "Split" and len(set(sizes)) == 1:
            self.alike[node] = lambda place: place % sizes[0]
        return True

    def _slice(self, node: Any, dim: int) -> bool:
        fn = node.grad_fn
        size, num_places = fn._saved_self_sym_sizes[dim], shape_of(fn)[dim]
        start, step = wrapped(fn._saved_start, size + 1), fn._saved_step
        if wrapped(fn._saved_dim, len(shape_of(fn))) == dim and num_places < size:

            def to_slice(place: int) -> Iterable[int]:
                there, off = divmod(place - start, step)
                return [there] if not off and 0 <= there < num_places else []

            _moves_in(node, [(to_slice, lambda place: [place * step + start])])
        return True

    def _pad(self, node: Any, dim: int) -> bool:
        shape, pad = shape_of(node.grad_fn), node.grad_fn._saved_pad
        behind = 2 * (len(shape) - 1 - dim)  # the last dimension comes first
        if behind < len(pad):
            before, after = pad[behind : behind + 2]
            _moves_in(node, [_shift(before, shape[dim] - before - after)])
        return True

    def _rearrangement(self, node: Any) -> Rearrangement | None:
        """What this operation and those just before it do together; None if it is not known where
        the channels were."""
        operations = [node.grad_fn]
        (source,) = node.inputs
        while _rearranges(source) and not _ends_moves(source):
            operations.insert(0, source.grad_fn)
            (source,) = source.inputs
        dim = self._dim(source)
        if dim is None:
            return None
        fn, number = operations[0].next_functions[0]
        return Rearrangement.by(operations, shape_of(fn, number), dim)

    def _dim(self, node: Any) -> int | None:
        """The dimension along which the channels of a node's output lie; None if not known."""
        if node not in self._dims:
            self._dims[node] = None  # where a layer is used twice there may be loops
            self._dims[node] = self._look_for_dim(node)
        return self._dims[node]

    def _look_for_dim(self, node: Any) -> int | None:
        if isinstance(node.module, _CHANNELS_SECOND):
            return 1
        if isinstance(node.module, _CHANNELS_LAST):
            return len(shape_of(node.grad_fn)) - 1
        if node.type not in _OPERATIONS:
            return None
        if _ends_moves(node):
            move = self._rearrangement(node)
            return None if move is None else move.dim
        for source in node.inputs:
            dim = self._dim(source)
            if dim is not None:
                return _after(node.grad_fn, source.grad_fn, dim)
        return None


def _rearranges(node: Any) -> bool:
    return node.type in _OPERATIONS and rearranges(node.grad_fn) and len(node.inputs) == 1


def _ends_moves(node: Any) -> bool:
    """Whether an operation rearranges, and not all that reads its output does."""
    return _rearranges(node) and not (node.outputs and all(map(_rearranges, node.outputs)))


def _after(grad_fn: Any, source: Any, dim: int) -> int | None:
    """Where channels along ``dim`` of the source lie in what an operation makes of it, which may be
    a mean over some dimensions."""
    before, after = len(shape_of(source)), len(shape_of(grad_fn))
    if after >= before:
        return dim + after - before
    gone = getattr(grad_fn, "_saved_dim", ())
    gone = {wrapped(each, before) for each in (gone if isinstance(gone, Sequence) else (gone,))}
    return None if dim in gone else dim - sum(each < dim for each in gone)


def _shift(start: int, size: int) -> tuple[_Move, _Move]:
    """From a part to the whole, and back."""

    def to_part(place: int) -> Iterable[int]:
        return [place - start] if start <= place < start + size else []

    return (lambda place: [place + start]), to_part


def _looked_up(table: Sequence[Sequence[int]]) -> _Move:
    """By the table; what it does not have is nowhere."""
    return lambda place: table[place] if place < len(table) else [-1]


def _moves_in(node: Any, moves: Sequence[tuple[_Move, _Move]]) -> None:
    """Channels move on their way into a node: how each input's do, and how they move back."""
    numbers: dict[Any, int] = {}
    for source, (forth, back) in zip(node.inputs, moves, strict=True):
        number = numbers.get(source, 0)
        numbers[source] = number + 1
        _ways(source, node)[number].index_mapping[1] = _applied(forth)
        _ways(node, source)[number].index_mapping[0] = _applied(back)


def _ways(one: Any, other: Any) -> list[Any]:
    return [dependency for dependency in one.dependencies if dependency.target is other]


def _applied(move: _Move) -> Callable[[Iterable[Any]], list[Spot]]:
    def mapping(spots: Iterable[Any]) -> list[Spot]:
        return [Spot(place, spot.root_idx) for spot in spots for place in move(spot.idx)]

    return mapping
