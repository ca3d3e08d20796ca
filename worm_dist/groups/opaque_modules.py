"""Opaque modules: placeholders for modules whose inside is not traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from .forward import floats

__all__ = ["Port", "PortPruner", "placeholders_for"]


class _Placeholder(nn.Module):
    """A replacement for an opaque module that returns the recorded outputs of that module.

    Args:
        module: the opaque module.
        outputs: the outputs of the module's calls, in order.
    """

    def __init__(self, module: nn.Module, outputs: Sequence[Any]) -> None:
        super().__init__()
        self.ports = nn.ModuleList(Port(module) for _ in floats(outputs[0]))
        self.__dict__["_replaces"] = module
        self.__dict__["_outputs"] = outputs
        self.__dict__["_num_calls"] = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Tracing may run the network several times, each time with the same calls.
        output = self._outputs[self._num_calls % len(self._outputs)]
        self.__dict__["_num_calls"] += 1
        read = [each for each in floats((args, kwargs)) if each.requires_grad]
        return _through_ports(
            output, iter(self.ports), read or [torch.zeros((), requires_grad=True)]
        )

    def __getattr__(self, name: str) -> Any:
        """Return the opaque module's attribute; torch's transformer layers read some of a child."""
        if name in self._modules:
            return self._modules[name]
        return getattr(self.__dict__["_replaces"], name)


class Port(nn.Module):
    """One output tensor of an opaque module, as a node of the graph."""

    replaces: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["replaces"] = module

    def forward(self, output: Tensor, read: Sequence[Tensor]) -> Any:
        return _Opaque.apply(output, *read)


def _through_ports(output: Any, ports: Iterator[nn.Module], read: Sequence[Tensor]) -> Any:
    """Return the same nested output with each float tensor passed through a port."""
    if isinstance(output, Tensor):
        is_float = output.is_floating_point() and output.numel()
        return next(ports)(output, read) if is_float else output
    if isinstance(output, Mapping):
        same: Any = copy.copy(output)  # keeps its type, which may be a library's
        for name, part in output.items():
            same[name] = _through_ports(part, ports, read)
        return same
    if isinstance(output, (tuple, list)):
        parts = [_through_ports(part, ports, read) for part in output]
        return type(output)(parts) if type(output) in (tuple, list) else type(output)(*parts)
    return output


class PortPruner(BasePruningFunc):  # type: ignore[misc]
    """The torch-pruning handler of a port, whose inputs and outputs share no channels."""

    def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
        raise AssertionError("the graph is read-only")

    def prune_in_channels(self, layer: Any, idxs: Any) -> Any:
        raise AssertionError("the graph is read-only")

    def get_out_channels(self, layer: Any) -> None:
        return None

    def get_in_channels(self, layer: Any) -> None:
        return None


class _Opaque(torch.autograd.Function):
    """A single autograd node from all inputs of an opaque module to one output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *read: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("the graph is read-only")


@contextmanager
def placeholders_for(
    module: nn.Module, opaque: Sequence[nn.Module], call: Callable[[], Any]
) -> Iterator[None]:
    """Replace the opaque parts of a module by placeholders within the context.

    Args:
        module: the module that contains them.
        opaque: the opaque parts.
        call: a function that runs the module as it will be run within the context.
    """
    outermost = _outermost(module, opaque)
    outputs: dict[nn.Module, list[Any]] = {part: [] for part in outermost}

    def record(part: nn.Module, args: Any, output: Any) -> None:
        outputs[part].append(output)

    handles = [part.register_forward_hook(record) for part in outermost]
    try:
        if handles:
            with torch.no_grad():
                call()
    finally:
        for handle in handles:
            handle.remove()
    placeholders = {part: _Placeholder(part, seen) for part, seen in outputs.items() if seen}
    replaced = []
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in placeholders:
                parent._modules[name] = placeholders[child]
                replaced.append((parent, name, child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


def _outermost(module: nn.Module, opaque: Sequence[nn.Module]) -> list[nn.Module]:
    inner = {part for outer in opaque for part in outer.modules() if part is not outer}
    return [part for part in opaque if part not in inner and part is not module]
