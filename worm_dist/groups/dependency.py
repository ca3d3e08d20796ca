"""Coupling: which layers share their channels, and at which places.

Read from the graph of the whole, unpruned network.  Where that cannot be built, the graphs of its
parts are, and the network is traced once more around the parts that are at fault.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .channel_flow import Stream, streams
from .checkpointing import checkpointing_off
from .forward import floats, undisturbed
from .graph import Graph
from .nested import mapped
from .opaque_modules import Port, PortPruner, standing_in
from .training_mode import deciding_modules, in_training

__all__ = ["Coupled", "coupled_layers"]

_MOST_QUESTIONS = 100_000
"""Questions for the width of a layer after which no more graphs are built: some seconds.  Counted,
not timed, so that all ranks give up at the same place.  DenseNet-201 takes 1424."""


@dataclass(frozen=True, eq=False)
class Coupled:
    """Layers that share their channels.

    Attributes:
        stream: of the channels.
        whole: whether the whole network was traced at once.
    """

    stream: Stream
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
    with undisturbed(network), checkpointing_off(), torch.enable_grad():
        # The graph follows autograd, which does not see what does not train.
        network.requires_grad_(True)
        tracer = _Tracer(network, example_inputs, opaque)
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


class _Tracer:
    """Builds graphs of a network and of its parts."""

    def __init__(
        self, network: nn.Module, example_inputs: Any, opaque: Collection[nn.Module]
    ) -> None:
        self._network = network
        self._deciding = deciding_modules(network, example_inputs)
        self._opaque = set(opaque)
        self._questions = iter(range(_MOST_QUESTIONS))
        self.untraced: dict[nn.Module, str] = {}

    def trace(self, module: nn.Module, call: _Call) -> list[Coupled]:
        """The sets of coupled channels in a module; what cannot be traced becomes opaque."""
        if not any(True for _ in module.parameters()):
            return []
        try:
            return self._coupled(module, call)
        except Exception as error:  # whatever a foreign tracer may raise
            reason = f"{type(error).__name__}: {error}"
        inside = {
            child: self.trace(child, its_call)
            for child, its_call in self._calls(module, call)
            if child not in self._opaque
        }
        hidden = [child for child in inside if child in self._opaque]
        if hidden:
            try:
                # Once more, around what is at fault.
                around = self._coupled(module, call)
                return around + [found for child in hidden for found in inside[child]]
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        self._opaque.add(module)
        self.untraced[module] = reason
        return [found for sets in inside.values() for found in sets]

    def _coupled(self, module: nn.Module, call: _Call) -> list[Coupled]:
        graph = Graph(self._questions)
        hidden = [part for part in module.modules() if part in self._opaque]
        with standing_in(module, hidden, lambda: self._run(module, call)):
            graph.build_dependency(
                module,
                example_inputs=call,
                forward_fn=self._run,
                output_transform=_with_a_gradient,
                customized_pruners={Port: PortPruner()},
                verbose=False,
            )
        return [Coupled(stream, module is self._network) for stream in streams(graph)]

    def _run(self, module: nn.Module, call: _Call) -> Any:
        args, kwargs = mapped((call.args, call.kwargs), lambda tensor: tensor.detach().clone())
        with in_training(self._network, self._deciding):
            return module(*args, **kwargs)

    def _calls(self, module: nn.Module, call: _Call) -> list[tuple[nn.Module, _Call]]:
        """The children that a call of the module calls, each with its first call."""
        calls: dict[nn.Module, _Call] = {}

        def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A list may grow once the child has read it, as DenseNet's features do, and a tensor
            # be written to.
            args, kwargs = mapped((args, kwargs), lambda tensor: tensor.detach().clone())
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
                self._run(module, call)
        finally:
            for handle in handles:
                handle.remove()
        return list(calls.items())


def _with_a_gradient(output: Any) -> list[Tensor]:
    """What the graph is followed from.

    Raises:
        ValueError: nothing, as where a detector finds nothing; its parts are traced then.
    """
    found = [each for each in floats(output) if each.requires_grad]
    if not found:
        raise ValueError("nothing that it puts out has a gradient")
    return found


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
