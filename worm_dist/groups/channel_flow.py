"""Channel flow: propagation of output channels through the dependency graph.

Every index of every layer is visited once.  Channels that meet at the same index are merged
(union-find), since neither can be removed without the other.  So the work is linear in the number
of indices, and the result is the finest partition into channels that can be dropped separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from .graph import Graph, Ints, Places, moved
from .opaque_modules import Port
from .selective_norm import SelectiveBatchNorm2d

__all__ = ["Layer", "Stream", "streams"]

Norm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd


class Layer(NamedTuple):
    """One side of a layer that a stream of channels passes through.

    Attributes:
        module: the layer, or a parameter that belongs to no layer.
        to_outputs: whether ``positions`` count the layer's outputs rather than its inputs.
        positions: int64 ``[channels, k]``: the indices of each channel along that side of the
            layer, in ascending order.
    """

    module: nn.Module | nn.Parameter
    to_outputs: bool
    positions: Tensor


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
    """Return the output channels of all convolutions, linear layers and selective norms."""
    return _ChannelFlow(graph).streams()


class _ChannelFlow:
    """Union-find over channels, which are numbered in the order of their first visit."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._widths = {each: self._ask_width(*each) for each in self._sides()}
        self._widest = max((width or 0 for width in self._widths.values()), default=0)
        # The parent of each channel in a forest of merged channels; a root is its own parent.
        self._parents: Ints = np.arange(0)
        self._unresolved: list[Ints] = []
        # By (node, side): the channel at each index, -1 if there is none.
        self._assigned: dict[tuple[Any, Any], Ints] = {}
        for node in graph.module2node.values():
            if isinstance(node.module, (Conv, nn.Linear, SelectiveBatchNorm2d)):
                self._propagate(node)
        for (node, side), assigned in self._assigned.items():
            self._union_parts(node, side, assigned)

    def streams(self) -> list[Stream]:
        sides = list(self._assigned)
        channels, numbers, indices = self._visits(sides)
        unresolved = set(self._find(np.concatenate([np.arange(0), *self._unresolved])).tolist())
        starts = np.flatnonzero(np.diff(channels, prepend=-1))
        by_route: dict[tuple[bytes, bool], list[int]] = {}
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(channels)]):
            route = numbers[start:end].tobytes()
            by_route.setdefault((route, int(channels[start]) in unresolved), []).append(start)
        found = []
        for (route, is_unresolved), first_visits in by_route.items():
            through = np.frombuffer(route, dtype=np.int64)
            table = indices[np.array(first_visits)[:, None] + np.arange(len(through))]
            passed = dict.fromkeys(through.tolist())
            layers = tuple(
                self._layer(node, side, table[:, through == number])
                for number in passed
                for node, side in [sides[number]]
                if node.type != OPTYPE.OUTPUT
            )
            found.append(Stream(layers, len(layers) < len(passed), is_unresolved))
        return found

    def _visits(self, sides: Sequence[tuple[Any, Any]]) -> Ints:
        """Return the indices at which channels pass through layers and outputs.

        Args:
            sides: the sides of all nodes.

        Returns:
            int64 ``[3, visits]``: the root of the channel, the number of the side and the index on
            it; ordered by the first, then by the second, then by the third.
        """
        visits = [np.empty((3, 0), dtype=np.int64)]
        for number, (node, side) in enumerate(sides):
            if node.type == OPTYPE.OUTPUT or _holds_channels(node.module):
                indices = np.flatnonzero(self._assigned[node, side] >= 0)
                channels = self._find(self._assigned[node, side][indices])
                visits.append(np.stack([channels, np.full_like(indices, number), indices]))
        together = np.concatenate(visits, axis=1)
        return together[:, together[0].argsort(kind="stable")]

    def _layer(self, node: Any, side: Any, positions: Ints) -> Layer:
        module = node.module.replaces if isinstance(node.module, Port) else node.module
        to_outputs = self._graph.is_out_channel_pruning_fn(side)
        return Layer(module, to_outputs, torch.tensor(positions))

    def _propagate(self, node: Any) -> None:
        """Propagate the outputs of a layer to all indices that have no channel yet."""
        side = self._graph.get_pruner_of_module(node.module).prune_out_channels
        free = np.flatnonzero(self._room(node, side, self._widths[node, side] or 0) < 0)
        new = len(self._parents) + np.arange(len(free))
        self._parents = np.concatenate([self._parents, new])
        pending = [(node, side, Places(free, new))]
        while pending:
            node, side, places = pending.pop()
            fresh = self._assign(node, side, places)
            for dependency in node.dependencies if len(fresh.indices) else ():
                if dependency.is_triggered_by(side):
                    there = fresh
                    for index_map in dependency.index_mapping:
                        there = moved(there, index_map)
                    pending.append((dependency.target, dependency.handler, there))

    def _room(self, node: Any, side: Any, size: int) -> Ints:
        """Return the channels that are assigned on one side, with room for so many indices."""
        assigned = self._assigned.setdefault((node, side), np.arange(0))
        if len(assigned) < size:
            width = max(size, self._widths[node, side] or 0)
            assigned = np.concatenate([assigned, np.full(width - len(assigned), -1)])
            self._assigned[node, side] = assigned
        return assigned

    def _assign(self, node: Any, side: Any, places: Places) -> Places:
        """Assign channels to indices; returns those whose index had no channel before."""
        width = self._widths[node, side] or self._widest
        within = (places.indices >= 0) & (places.indices < width)
        if not within.all():
            self._unresolved.append(places.channels[~within])
            places = Places(places.indices[within], places.channels[within])
        indices, channels = places
        assigned = self._room(node, side, int(indices.max(initial=-1)) + 1)
        if not len(indices):
            return places
        is_fresh = assigned[indices] < 0
        fresh, first = np.unique(indices[is_fresh], return_index=True)
        assigned[fresh] = channels[is_fresh][first]
        self._union(assigned[indices], channels)
        return Places(fresh, assigned[fresh])

    def _union_parts(self, node: Any, side: Any, assigned: Ints) -> None:
        """Merge channels at the same index of equal parts, which must lose the same channels.

        The parts are those of a split or shuffle, or the groups of a grouped convolution.
        """
        part_index = self._graph.part_index.get(node)
        module = node.module
        if isinstance(module, Conv) and module.groups > 1 and node.type != OPTYPE.DEPTHWISE_CONV:
            width = (self._widths[node, side] or 0) // module.groups
            part_index = lambda indices: indices % width  # noqa: E731
        if part_index is not None:
            indices = np.flatnonzero(assigned >= 0)
            channels = assigned[indices]
            _, first, part = np.unique(part_index(indices), return_index=True, return_inverse=True)
            self._union(channels[first][part], channels)

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

    def _union(self, ones: Ints, others: Ints) -> None:
        """Merge pairs of channels; the root of merged channels is the one with the least number."""
        while (ones != others).any():
            ones, others = self._find(ones), self._find(others)
            # If a root is merged with several others here, the least wins; the rest come again.
            np.minimum.at(self._parents, np.maximum(ones, others), np.minimum(ones, others))

    def _find(self, channels: Ints) -> Ints:
        """Return the roots of channels."""
        roots = self._parents[channels]
        while (roots != (above := self._parents[roots])).any():
            roots = above
        self._parents[channels] = roots
        return roots


def _holds_channels(module: Any) -> bool:
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False
    if isinstance(module, (nn.Parameter, Norm, Port)):
        return True
    return any(True for _ in module.parameters())
