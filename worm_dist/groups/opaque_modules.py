"""Stand-in: what is in the place of a module that tracing does not look into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from .forward import floats

__all__ = ["Port", "PortPruner", "standing_in"]


class _StandIn(nn.Module):
    """In the place of an opaque module: gives what that gave, without its inner workings."""

    def __init__(self, module: nn.Module, outputs: Sequence[Any]) -> None:
        super().__init__()
        self.ports = nn.ModuleList(Port(module) for _ in floats(outputs[0]))
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


class Port(nn.Module):
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


class PortPruner(BasePruningFunc):  # type: ignore[misc]
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
def standing_in(
    module: nn.Module, hidden: Sequence[nn.Module], call: Callable[[], Any]
) -> Iterator[None]:
    """Within, stand-ins are in the places of the hidden parts of a module.

    Args:
        call: runs the module, as it will be run within.
    """
    outermost = _outermost(module, hidden)
    outputs: dict[nn.Module, list[Any]] = {part: [] for part in outermost}

    def note(part: nn.Module, args: Any, output: Any) -> None:
        outputs[part].append(output)

    handles = [part.register_forward_hook(note) for part in outermost]
    try:
        if handles:
            with torch.no_grad():
                call()
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
