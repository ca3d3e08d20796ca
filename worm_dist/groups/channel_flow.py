"""Channel flow: propagation of output channels through the dependency graph.

Every index of every layer is visited once.  Channels that meet at the same index are merged
(union-find), since neither can be removed without the other.  So the work is linear in the number
of indices, and the result is the finest partition into channels that can be dropped separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch_pruning.ops import OPTYPE

from .graph import ChannelIndex, Graph
from .opaque_modules import Port

__all__ = ["Layer", "Stream", "streams"]

Norm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd


class Layer(NamedTuple):
    """One side of a layer that a stream of channels passes through.

    Attributes:
        module: the layer, or a parameter that belongs to no layer.
        to_outputs: whether ``indices`` count the layer's outputs rather than its inputs.
        indices: the indices along that side of the layer.
        channels: the channel at each of these indices.
    """

    module: nn.Module | nn.Parameter
    to_outputs: bool
    indices: Sequence[int]
    channels: Sequence[int]


class Stream(NamedTuple):
    """Channels that pass through the same layers, each with the same number of indices.

    Attributes:
        layers: the layers with parameters, and normalisations, that the channels pass through.
        reaches_output: whether the channels are outputs of the traced module.
        is_unresolved: whether an index was out of range, so that the graph cannot be trusted.
    """

    layers: tuple[Layer, ...]
    reaches_output: bool
    is_unresolved: bool


def streams(graph: Graph) -> list[Stream]:
    """Return the output channels of all convolutions and linear layers."""
    return _ChannelFlow(graph).streams()


class _ChannelFlow:
    """Union-find over channels, which are numbered in the order of their first visit."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._parents: list[int] = []
        self._unresolved: set[int] = set()
        # By (node, side): the channel at each index.
        self._assigned: dict[tuple[Any, Any], dict[int, int]] = {}
        self._widths = {each: self._ask_width(*each) for each in self._sides()}
        self._widest = max((width or 0 for width in self._widths.values()), default=0)
        for node in graph.module2node.values():
            if isinstance(node.module, (Conv, nn.Linear)):
                self._propagate(node)
        for (node, side), assigned in self._assigned.items():
            self._union_parts(node, side, assigned)

    def streams(self) -> list[Stream]:
        visits: dict[int, list[tuple[int, int]]] = {}
        sides = list(self._assigned)
        for number, (node, side) in enumerate(sides):
            if node.type == OPTYPE.OUTPUT or _holds_channels(node.module):
                for index, channel in sorted(self._assigned[node, side].items()):
                    visits.setdefault(self._find(channel), []).append((number, index))
        unresolved = {self._find(channel) for channel in self._unresolved}
        by_route: dict[Any, list[int]] = {}
        for channel in sorted(visits):
            route = tuple(number for number, _ in visits[channel])
            by_route.setdefault((route, channel in unresolved), []).append(channel)
        found = []
        for (route, is_unresolved), channels in by_route.items():
            pairs: dict[int, list[tuple[int, int]]] = {number: [] for number in route}
            for position, channel in enumerate(channels):
                for number, index in visits[channel]:
                    pairs[number].append((index, position))
            layers = tuple(
                self._layer(*sides[number], here)
                for number, here in pairs.items()
                if sides[number][0].type != OPTYPE.OUTPUT
            )
            found.append(Stream(layers, len(layers) < len(pairs), is_unresolved))
        return found

    def _layer(self, node: Any, side: Any, pairs: Sequence[tuple[int, int]]) -> Layer:
        module = node.module.stands_for if isinstance(node.module, Port) else node.module
        indices, channels = zip(*pairs)
        return Layer(module, self._graph.is_out_channel_pruning_fn(side), indices, channels)

    def _propagate(self, node: Any) -> None:
        """Propagate the outputs of a layer to all indices that have no channel yet."""
        side = self._graph.get_pruner_of_module(node.module).prune_out_channels
        width = self._widths[node, side] or 0
        known = self._assigned.get((node, side), {})
        new = []
        for index in range(width):
            if index not in known:
                new.append(ChannelIndex(index, len(self._parents)))
                self._parents.append(len(self._parents))
        pending: list[tuple[Any, Any, Sequence[Any]]] = [(node, side, new)]
        while pending:
            node, side, entries = pending.pop()
            fresh = self._assign(node, side, entries)
            for dependency in node.dependencies if fresh else ():
                if dependency.is_triggered_by(side):
                    moved = fresh
                    for mapping in dependency.index_mapping:
                        moved = moved if mapping is None else mapping(moved)
                    pending.append((dependency.target, dependency.handler, moved))

    def _assign(self, node: Any, side: Any, entries: Iterable[Any]) -> Sequence[Any]:
        """Assign channels to indices; returns those whose index had no channel before."""
        assigned = self._assigned.setdefault((node, side), {})
        width = self._widths[node, side] or self._widest
        fresh = []
        for entry in entries:
            if not 0 <= entry.idx < width:
                self._unresolved.add(entry.root_idx)
            elif entry.idx in assigned:
                self._union(assigned[entry.idx], entry.root_idx)
            else:
                assigned[entry.idx] = entry.root_idx
                fresh.append(entry)
        return fresh

    def _union_parts(self, node: Any, side: Any, assigned: dict[int, int]) -> None:
        """Merge channels at the same index of equal parts, which must lose the same channels.

        The parts are those of a split or shuffle, or the groups of a grouped convolution.
        """
        part_index = self._graph.part_index.get(node)
        module = node.module
        if isinstance(module, Conv) and module.groups > 1 and node.type != OPTYPE.DEPTHWISE_CONV:
            width = (self._widths[node, side] or 0) // module.groups
            part_index = lambda index: index % width  # noqa: E731
        if part_index is not None:
            first: dict[int, int] = {}
            for index, channel in assigned.items():
                self._union(first.setdefault(part_index(index), channel), channel)

    def _sides(self) -> Iterable[tuple[Any, Any]]:
        for node in self._graph.module2node.values():
            pruner = self._graph.get_pruner_of_module(node.module)
            yield node, pruner.prune_out_channels
            yield node, pruner.prune_in_channels

    def _ask_width(self, node: Any, side: Any) -> int | None:
        """Return the number of channels on one side of a node; None if unknown."""
        if node.type == OPTYPE.OUTPUT:
            return None  # torch-pruning assumes the second dimension, which may be another one
        to_outputs = self._graph.is_out_channel_pruning_fn(side)
        width = self._graph.get_out_channels if to_outputs else self._graph.get_in_channels
        num_channels: int | None = width(node)
        return num_channels

    def _union(self, one: int, other: int) -> None:
        one, other = self._find(one), self._find(other)
        self._parents[max(one, other)] = min(one, other)

    def _find(self, channel: int) -> int:
        while self._parents[channel] != channel:
            self._parents[channel] = self._parents[self._parents[channel]]
            channel = self._parents[channel]
        return channel


def _holds_channels(module: Any) -> bool:
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False
    if isinstance(module, (nn.Parameter, Norm, Port)):
        return True
    return any(True for _ in module.parameters())
