"""Copies of a network to run and modify, so that the network itself stays unchanged."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from .forward import undisturbed

__all__ = ["copied", "scratch_copy"]


@contextmanager
def scratch_copy(network: nn.Module) -> Iterator[nn.Module]:
    """Provide a copy of the network in eval mode, to be run and modified.

    Random states are restored afterwards.  Buffers that a forward pass writes to, and modules and
    hooks that it installs on its first run, belong to the copy only.

    Raises:
        ConfigError: the network cannot be copied.
    """
    try:
        network_copy = copied(network)
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"model: it cannot be copied for a trial run, because of "
            f"{_uncopyable_module(network)}: {type(error).__name__}: {error}"
        ) from error
    with undisturbed(network_copy):
        yield network_copy


def copied(network: nn.Module, copy_data: Callable[[Tensor], Tensor] = torch.clone) -> nn.Module:
    """Return a deep copy of the network.

    Only what cannot be copied, such as locks and process groups, is shared.  Hooks are copied with
    the modules; the autograd graphs of stored tensors are not.

    Args:
        network: the network to copy.
        copy_data: a function from the data of a parameter to those of its copy; if it returns its
            argument, the parameters are new but share their memory with those of the network.
    """
    with suppress(Exception):  # user code may raise anything
        return copy.deepcopy(network, _memo(network, copy_data))
    with _WithoutGraphs():
        shared = {
            id(part): part
            for module in network.modules()
            for part in _parts(vars(module))
            if not _copies(part)
        }
        return copy.deepcopy(network, _memo(network, copy_data) | shared)


def _memo(network: nn.Module, copy_data: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """Return a memo for ``deepcopy``: copies of parts of the network, by the ids of the parts."""
    parameters = {
        id(parameter): nn.Parameter(copy_data(parameter.detach()), parameter.requires_grad)
        for parameter in network.parameters()
        if type(parameter) is nn.Parameter  # others know how to copy themselves
    }
    # A module has a dozen empty containers, mostly of hooks, for which deepcopy takes longest.
    containers = {
        id(part): type(part)()
        for module in network.modules()
        for part in vars(module).values()
        if type(part) in (dict, OrderedDict, set) and not part
    }
    return {**parameters, **containers}


class _WithoutGraphs(TorchFunctionMode):
    """Copy tensors that have an autograd graph without it; ``deepcopy`` of torch refuses them.

    Modules and hooks may store such tensors: a feature for an auxiliary loss, or a weight that
    ``weight_norm`` or ``prune`` has computed.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not Tensor.__deepcopy__ or args[0].is_leaf:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


def _parts(value: Any) -> Iterator[Any]:
    """Iterate over the values of a module's attributes, also inside containers."""
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)
    else:
        yield value


def _copies(part: Any) -> bool:
    """Whether an attribute value can be copied; assumed for modules, tensors and their methods."""
    if isinstance(getattr(part, "__self__", part), (nn.Module, Tensor)):
        return True
    try:
        copy.deepcopy(part)
    except Exception:  # user code may raise anything
        return False
    return True


def _uncopyable_module(network: nn.Module) -> str:
    """Describe the innermost module that cannot be copied, for an error message."""
    for name, module in reversed(list(network.named_modules())):
        try:
            copied(module)
        except Exception:  # user code may raise anything
            return f"{name or 'the network'} ({type(module).__name__})"
    return "the container of its modules"
