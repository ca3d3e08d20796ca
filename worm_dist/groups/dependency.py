"""Dependencies: the layers that share channels, and the indices of these channels.

Read from the dependency graph of the unpruned network.  If that cannot be built, the submodules are
traced separately, and the network is traced again with placeholders for the untraceable ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .channel_flow import Stream, streams
from .checkpointing import checkpointing_off
from .forward import floats, in_training, undisturbed
from .graph import Graph
from .nested import mapped
from .opaque_modules import Port, PortPruner, placeholders_for
from .selective_norm import SelectiveBatchNorm2d, SelectiveNormPruner

__all__ = ["Coupled", "coupled_layers"]

_MAX_WIDTH_QUERIES = 100_000
"""Limit on queries for a layer's width, after which no more graphs are built: some seconds.
Counted, not timed, so that all ranks give up at the same point.  DenseNet-201 takes 1424."""


@dataclass(frozen=True, eq=False)
class Coupled:
    """Layers that share channels.

    Attributes:
        stream: the stream of these channels.
        whole: whether the network was traced in one piece, so that its outputs are known.
    """

    stream: Stream
    whole: bool


def coupled_layers(
    network: nn.Module,
    example_inputs: Any,
    opaque: Collection[nn.Module],
    deciding: Collection[str],
) -> tuple[list[Coupled], dict[nn.Module, str]]:
    """Find all sets of coupled channels.

    Args:
        network: the unwrapped network.
        example_inputs: inputs as for ``forward.run``.
        opaque: modules whose inside is not traced.
        deciding: names of the modules that are in training mode while the network is traced.

    Returns:
        The sets, and the reason for each module that could not be traced.
    """
    with undisturbed(network), checkpointing_off(), torch.enable_grad():
        # The graph follows autograd, which ignores parameters that do not require gradients.
        network.requires_grad_(True)
        tracer = _Tracer(network, opaque, deciding)
        return tracer.trace(network, _Call.of(example_inputs)), tracer.untraced


class _Call(NamedTuple):
    """The arguments of one module call."""

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
        self, network: nn.Module, opaque: Collection[nn.Module], deciding: Collection[str]
    ) -> None:
        self._network = network
        self._deciding = deciding
        self._opaque = set(opaque)
        self._queries = iter(range(_MAX_WIDTH_QUERIES))
        self.untraced: dict[nn.Module, str] = {}

    def trace(self, module: nn.Module, call: _Call) -> list[Coupled]:
        """Find the coupled channels of a module; submodules that cannot be traced become opaque."""
        if not any(True for _ in module.parameters()):
            return []
        try:
            return self._coupled(module, call)
        except Exception as error:  # user code and torch-pruning may raise anything
            reason = f"{type(error).__name__}: {error}"
        inside = {
            child: self.trace(child, child_call)
            for child, child_call in self._calls(module, call)
            if child not in self._opaque
        }
        opaque_parts = [child for child in inside if child in self._opaque]
        if opaque_parts:
            try:
                # Again, with placeholders for the untraceable submodules.
                around = self._coupled(module, call)
                return around + [found for child in opaque_parts for found in inside[child]]
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        self._opaque.add(module)
        self.untraced[module] = reason
        return [found for sets in inside.values() for found in sets]

    def _coupled(self, module: nn.Module, call: _Call) -> list[Coupled]:
        graph = Graph(self._queries)
        opaque_parts = [part for part in module.modules() if part in self._opaque]
        with placeholders_for(module, opaque_parts, lambda: self._run(module, call)):
            graph.build_dependency(
                module,
                example_inputs=call,
                forward_fn=self._run,
                output_transform=_with_gradient,
                customized_pruners={
                    Port: PortPruner(),
                    SelectiveBatchNorm2d: SelectiveNormPruner(),
                },
                verbose=False,
            )
        return [Coupled(stream, module is self._network) for stream in streams(graph)]

    def _run(self, module: nn.Module, call: _Call) -> Any:
        args, kwargs = mapped((call.args, call.kwargs), lambda tensor: tensor.detach().clone())
        with in_training(self._network, self._deciding):
            return module(*args, **kwargs)

    def _calls(self, module: nn.Module, call: _Call) -> list[tuple[nn.Module, _Call]]:
        """Return the children that a call of the module runs, each with its first call."""
        calls: dict[nn.Module, _Call] = {}

        def record(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Arguments may change later: DenseNet's list of features grows, tensors are modified.
            args, kwargs = mapped((args, kwargs), lambda tensor: tensor.detach().clone())
            calls.setdefault(child, _Call(args, kwargs))

        # A list of modules is never called itself.
        children = [
            part
            for child in module.children()
            for part in (child.children() if _is_container(child) else (child,))
        ]
        handles = [child.register_forward_pre_hook(record, with_kwargs=True) for child in children]
        try:
            with torch.no_grad():
                self._run(module, call)
        finally:
            for handle in handles:
                handle.remove()
        return list(calls.items())


def _with_gradient(output: Any) -> list[Tensor]:
    """Return the outputs that require gradients, from which the graph is traced.

    Raises:
        ValueError: there are none, such as when a detector detects nothing; its submodules are
            traced instead.
    """
    found = [each for each in floats(output) if each.requires_grad]
    if not found:
        raise ValueError("none of its outputs has a gradient")
    return found


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
