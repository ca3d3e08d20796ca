"""Flow: where in the graph of a network the output channels of its layers arrive.

Every place of every layer is gone through once.  Where a second channel arrives at a place, the two
are one channel from then on: nothing could be removed of one without the other.  So the work is
bounded by the number of places, and what comes out is the finest division into channels that can
be dropped one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch_pruning.ops import OPTYPE

from .graph import Graph, Spot
from .opaque_modules import Port

__all__ = ["Layer", "Stream", "streams"]

Norm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd


class Layer(NamedTuple):
    """The part of one layer in a stream of channels.

    Attributes:
        module: the layer, or a parameter that belongs to none.
        to_outputs: whether its outputs are meant.
        places: along that side of the layer.
        channels: the channel at each place.
    """

    module: nn.Module | nn.Parameter
    to_outputs: bool
    places: Sequence[int]
    channels: Sequence[int]


class Stream(NamedTuple):
    """Channels that go through the same layers, each through as many places as the others.

    Attributes:
        layers: those that hold parameters, or are normalisations.
        leaves: whether the channels leave what was traced: they are its outputs.
        strays: whether they arrive where no place is: the graph was not understood.
    """

    layers: tuple[Layer, ...]
    leaves: bool
    strays: bool


def streams(graph: Graph) -> list[Stream]:
    """All channels that convolutions and linear layers put out."""
    return _Flow(graph).streams()


class _Flow:
    """Channels by number, in the order in which they were met."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._same_as: list[int] = []
        self._astray: set[int] = set()
        # By node and side: the channel at each place.
        self._arrived: dict[tuple[Any, Any], dict[int, int]] = {}
        self._widths = {each: self._ask_width(*each) for each in self._sides()}
        self._widest = max((width or 0 for width in self._widths.values()), default=0)
        for node in graph.module2node.values():
            if isinstance(node.module, (Conv, nn.Linear)):
                self._pour(node)
        for (node, side), arrived in self._arrived.items():
            self._unite_alike(node, side, arrived)

    def streams(self) -> list[Stream]:
        passed: dict[int, list[tuple[int, int]]] = {}
        sides = list(self._arrived)
        for number, (node, side) in enumerate(sides):
            if node.type == OPTYPE.OUTPUT or _holds_channels(node.module):
                for place, channel in sorted(self._arrived[node, side].items()):
                    passed.setdefault(self._find(channel), []).append((number, place))
        astray = {self._find(channel) for channel in self._astray}
        alike: dict[Any, list[int]] = {}
        for channel in sorted(passed):
            way = tuple(number for number, _ in passed[channel])
            alike.setdefault((way, channel in astray), []).append(channel)
        found = []
        for (way, strays), channels in alike.items():
            spots: dict[int, list[tuple[int, int]]] = {number: [] for number in way}
            for index, channel in enumerate(channels):
                for number, place in passed[channel]:
                    spots[number].append((place, index))
            here = [(sides[number], at) for number, at in spots.items()]
            layers = tuple(
                self._layer(node, side, at)
                for (node, side), at in here
                if node.type != OPTYPE.OUTPUT
            )
            found.append(Stream(layers, len(layers) < len(here), strays))
        return found

    def _layer(self, node: Any, side: Any, spots: Sequence[tuple[int, int]]) -> Layer:
        module = node.module.stands_for if isinstance(node.module, Port) else node.module
        places, channels = zip(*spots)
        return Layer(module, self._graph.is_out_channel_pruning_fn(side), places, channels)

    def _pour(self, node: Any) -> None:
        """Let the outputs of a layer flow, as far as none has arrived there yet."""
        side = self._graph.get_pruner_of_module(node.module).prune_out_channels
        width = self._widths[node, side] or 0
        known = self._arrived.get((node, side), {})
        new = []
        for place in range(width):
            if place not in known:
                new.append(Spot(place, len(self._same_as)))
                self._same_as.append(len(self._same_as))
        left: list[tuple[Any, Any, Sequence[Any]]] = [(node, side, new)]
        while left:
            node, side, spots = left.pop()
            fresh = self._arrive(node, side, spots)
            for dependency in node.dependencies if fresh else ():
                if dependency.is_triggered_by(side):
                    moved = fresh
                    for mapping in dependency.index_mapping:
                        moved = moved if mapping is None else mapping(moved)
                    left.append((dependency.target, dependency.handler, moved))

    def _arrive(self, node: Any, side: Any, spots: Iterable[Any]) -> Sequence[Any]:
        """Those of the spots where nothing was before."""
        arrived = self._arrived.setdefault((node, side), {})
        width = self._widths[node, side] or self._widest
        fresh = []
        for spot in spots:
            if not 0 <= spot.idx < width:
                self._astray.add(spot.root_idx)
            elif spot.idx in arrived:
                self._unite(arrived[spot.idx], spot.root_idx)
            else:
                arrived[spot.idx] = spot.root_idx
                fresh.append(spot)
        return fresh

    def _unite_alike(self, node: Any, side: Any, arrived: dict[int, int]) -> None:
        """A convolution with several groups of its own must lose the same channels in each."""
        alike = self._graph.alike.get(node)
        module = node.module
        if isinstance(module, Conv) and module.groups > 1 and node.type != OPTYPE.DEPTHWISE_CONV:
            width = (self._widths[node, side] or 0) // module.groups
            alike = lambda place: place % width  # noqa: E731
        if alike is not None:
            first: dict[int, int] = {}
            for place, channel in arrived.items():
                self._unite(first.setdefault(alike(place), channel), channel)

    def _sides(self) -> Iterable[tuple[Any, Any]]:
        for node in self._graph.module2node.values():
            pruner = self._graph.get_pruner_of_module(node.module)
            yield node, pruner.prune_out_channels
            yield node, pruner.prune_in_channels

    def _ask_width(self, node: Any, side: Any) -> int | None:
        """Places on one side of a node; None if it does not say."""
        if node.type == OPTYPE.OUTPUT:
            return None  # torch-pruning takes the second dimension, whichever has the channels
        to_outputs = self._graph.is_out_channel_pruning_fn(side)
        width = self._graph.get_out_channels if to_outputs else self._graph.get_in_channels
        places: int | None = width(node)
        return places

    def _unite(self, one: int, other: int) -> None:
        one, other = self._find(one), self._find(other)
        self._same_as[max(one, other)] = min(one, other)

    def _find(self, channel: int) -> int:
        while self._same_as[channel] != channel:
            self._same_as[channel] = self._same_as[self._same_as[channel]]
            channel = self._same_as[channel]
        return channel


def _holds_channels(module: Any) -> bool:
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False
    if isinstance(module, (nn.Parameter, Norm, Port)):
        return True
    return any(True for _ in module.parameters())
