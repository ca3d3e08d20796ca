"""Coupling: which layers share their channels, and by which indices.

Read from torch-pruning's dependency graph (Fang et al., CVPR 2023), always from the graph of the
whole, unpruned network: behind a concatenation indices shift as soon as anything is removed.
Where the graph of a network cannot be built, the graphs of its parts are, and the network is
traced once more around the parts that are at fault.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from .forward import floats, undisturbed

__all__ = ["Coupled", "Layer", "coupled_layers"]

_MOST_CALLS = 200_000_000
"""Calls of Python functions after which a graph is given up: a minute or two.  Counted, not timed,
so that all ranks give up at the same place.  ResNet-152 takes .7 million."""


class Layer(NamedTuple):
    """The part of one layer in a set of coupled channels.

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


@dataclass(frozen=True, eq=False)
class Coupled:
    """Layers that share their channels.

    Attributes:
        layers: those that hold parameters, or are normalisations.
        leaves: whether the channels leave what was traced: they are its outputs.
        whole: whether that was the whole network.
    """

    layers: tuple[Layer, ...]
    leaves: bool
    whole: bool


def coupled_layers(
    network: nn.Module, example_inputs: Any, opaque: Collection[nn.Module]
) -> tuple[list[Coupled], dict[nn.Module, str]]:
    """All sets of coupled channels.

    Args:
        network: not wrapped.
        example_inputs: as for ``forward.run``.
        opaque: modules that are not looked into.

    Returns:
        The sets, and the modules that could not be traced, each with the reason.
    """
    with undisturbed(network), torch.enable_grad():
        # The graph follows autograd, which does not see what does not train.
        network.requires_grad_(True)
        tracer = _Tracer(network, opaque)
        return tracer.trace(network, _Call.of(example_inputs)), tracer.untraced


class _Call(NamedTuple):
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> _Call:
        if isinstance(inputs, Mapping):
            return cls((), inputs)
        return cls(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})

    def repeat(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


class _Tracer:
    """Builds graphs of a network and of its parts."""

    def __init__(self, network: nn.Module, opaque: Collection[nn.Module]) -> None:
        self._network = network
        self._opaque = set(opaque)
        self.untraced: dict[nn.Module, str] = {}

    def trace(self, module: nn.Module, call: _Call) -> list[Coupled]:
        """The sets of coupled channels in a module; what cannot be traced becomes opaque."""
        try:
            return self._graph(module, call)
        except Exception as error:  # whatever a foreign tracer may raise
            reason = f"{type(error).__name__}: {error}"
        inside = {
            child: self.trace(child, its_call)
            for child, its_call in _calls(module, call)
            if child not in self._opaque
        }
        hidden = [child for child in inside if child in self._opaque]
        if hidden:
            try:
                # Once more, around what is at fault.
                around = self._graph(module, call)
                return around + [found for child in hidden for found in inside[child]]
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        self._opaque.add(module)
        self.untraced[module] = reason
        return [found for sets in inside.values() for found in sets]

    def _graph(self, module: nn.Module, call: _Call) -> list[Coupled]:
        graph = torch_pruning.DependencyGraph()
        hidden = [part for part in module.modules() if part in self._opaque]
        with _standing_in(module, hidden, call), _bounded():
            graph.build_dependency(
                module,
                example_inputs=call,
                forward_fn=lambda module, call: call.repeat(module),
                output_transform=lambda out: [each for each in floats(out) if each.requires_grad],
                customized_pruners={_Port: _PortPruner()},
                verbose=False,
            )
            whole = module is self._network
            return [
                Coupled(tuple(_layers(group)), _leaves(group), whole)
                for group in graph.get_all_groups()
            ]


def _layers(group: Any) -> Iterator[Layer]:
    for item in group:
        module = item.dep.target.module
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        bare = isinstance(module, nn.Parameter)
        port = isinstance(module, _Port)
        if bare or norm or port or any(True for _ in module.parameters()):
            to_outputs = group._DG.is_out_channel_pruning_fn(item.dep.handler)
            meant = module.stands_for if port else module
            yield Layer(meant, to_outputs, item.idxs, item.root_idxs)


def _leaves(group: Any) -> bool:
    return any(type(item.dep.target.module).__name__ == "_OutputOp" for item in group)


def _calls(module: nn.Module, call: _Call) -> list[tuple[nn.Module, _Call]]:
    """The children that a call of the module calls, each with its first call."""
    calls: dict[nn.Module, _Call] = {}

    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A list may grow once the child has read it: DenseNet's features do.
        args = tuple(list(each) if isinstance(each, list) else each for each in args)
        calls.setdefault(child, _Call(args, kwargs))

    # A list of modules is never called itself.
    children = [
        part
        for child in module.children()
        for part in (child.children() if _is_container(child) else (child,))
    ]
    handles = [child.register_forward_pre_hook(note, with_kwargs=True) for child in children]
    try:
        with torch.no_grad():
            call.repeat(module)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.items())


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


class _StandIn(nn.Module):
    """In the place of an opaque module: gives what that gave, without its inner workings."""

    def __init__(self, module: nn.Module, outputs: Sequence[Any]) -> None:
        super().__init__()
        self.ports = nn.ModuleList(_Port(module) for _ in floats(outputs[0]))
        self.__dict__["_stands_for"] = module
        self.__dict__["_outputs"] = outputs
        self.__dict__["_num_calls"] = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Tracing may run the network several times, each time alike.
        output = self._outputs[self._num_calls % len(self._outputs)]
        self.__dict__["_num_calls"] += 1
        read = [each for each in floats((args, kwargs)) if each.requires_grad]
        return _put_out(output, iter(self.ports), read or [torch.zeros((), requires_grad=True)])

    def __getattr__(self, name: str) -> Any:
        """Code around a module looks at its attributes, torch's own transformer layers do."""
        if name in self._modules:
            return self._modules[name]
        return getattr(self.__dict__["_stands_for"], name)


class _Port(nn.Module):
    """One of the tensors that an opaque module puts out, one node of the graph."""

    stands_for: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["stands_for"] = module

    def forward(self, output: Tensor, read: Sequence[Tensor]) -> Any:
        return _Opaque.apply(output, *read)


def _put_out(output: Any, ports: Iterator[nn.Module], read: Sequence[Tensor]) -> Any:
    """The same output, its tensors through the ports."""
    if isinstance(output, Tensor):
        is_float = output.is_floating_point() and output.numel()
        return next(ports)(output, read) if is_float else output
    if isinstance(output, Mapping):
        same: Any = copy.copy(output)  # of its own type, which may be a library's
        for name, part in output.items():
            same[name] = _put_out(part, ports, read)
        return same
    if isinstance(output, (tuple, list)):
        parts = [_put_out(part, ports, read) for part in output]
        return type(output)(parts) if type(output) in (tuple, list) else type(output)(*parts)
    return output


class _PortPruner(BasePruningFunc):  # type: ignore[misc]
    """For torch-pruning, a module whose inputs and outputs have nothing to do with each other."""

    def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
        raise AssertionError("the graph is only looked at")

    def prune_in_channels(self, layer: Any, idxs: Any) -> Any:
        raise AssertionError("the graph is only looked at")

    def get_out_channels(self, layer: Any) -> None:
        return None

    def get_in_channels(self, layer: Any) -> None:
        return None


class _Opaque(torch.autograd.Function):
    """One node of the autograd graph, from anything to anything."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *read: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("the graph is only looked at")


@contextmanager
def _standing_in(module: nn.Module, hidden: Sequence[nn.Module], call: _Call) -> Iterator[None]:
    """Within, stand-ins are in the places of the hidden modules."""
    outermost = _outermost(module, hidden)
    outputs: dict[nn.Module, list[Any]] = {part: [] for part in outermost}

    def note(part: nn.Module, args: Any, output: Any) -> None:
        outputs[part].append(output)

    handles = [part.register_forward_hook(note) for part in outermost]
    try:
        if handles:
            with torch.no_grad():
                call.repeat(module)
    finally:
        for handle in handles:
            handle.remove()
    stand_ins = {part: _StandIn(part, seen) for part, seen in outputs.items() if seen}
    replaced = []
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in stand_ins:
                parent._modules[name] = stand_ins[child]
                replaced.append((parent, name, child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


def _outermost(module: nn.Module, hidden: Sequence[nn.Module]) -> list[nn.Module]:
    inner = {part for outer in hidden for part in outer.modules() if part is not outer}
    return [part for part in hidden if part not in inner and part is not module]


@contextmanager
def _bounded() -> Iterator[None]:
    """Within, too much work is an error."""
    calls_left = _MOST_CALLS
    before = sys.getprofile()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls_left
        if event == "call":
            calls_left -= 1
            if calls_left < 0:
                sys.setprofile(before)
                raise TimeoutError(f"no end after {_MOST_CALLS:,} calls")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
