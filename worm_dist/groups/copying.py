"""Copying: a network's copy to try things on, so that the network itself is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from .forward import undisturbed

__all__ = ["copied", "scratch"]


@contextmanager
def scratch(network: nn.Module) -> Iterator[nn.Module]:
    """Within, a copy of the network in eval mode, to be run and to be changed.  The random state is
    afterwards what it was, and so is the network: buffers that a forward pass writes to, and
    modules and hooks that it installs when it first runs, are the copy's.

    Raises:
        ConfigError: it cannot be copied.
    """
    try:
        apart = copied(network)
    except Exception as error:  # whatever a foreign part may raise
        raise ConfigError(
            f"model: no copy of it can be made to try things on, because of "
            f"{_at_fault(network)}: {type(error).__name__}: {error}"
        ) from error
    with undisturbed(apart):
        yield apart


def copied(network: nn.Module) -> nn.Module:
    """A copy that shares nothing with the network but what cannot be copied, such as locks and
    process groups, and nothing with its training: what hooks it holds are the network's own, and
    the graph of tensors that it keeps is left behind."""
    with _GraphsLeftBehind():
        try:
            return copy.deepcopy(network)
        except Exception:  # whatever a foreign part may raise
            shared = (
                part
                for module in network.modules()
                for part in _parts(vars(module))
                if not _copies(part)
            )
            return copy.deepcopy(network, {id(part): part for part in shared})


class _GraphsLeftBehind(TorchFunctionMode):
    """Within, tensors that have a graph are copied without it; torch refuses to copy them.

    Networks keep such, and so do hooks: a feature for a loss of its own, a weight that
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
    """What a module's attributes hold, also in containers."""
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)
    else:
        yield value


def _copies(part: Any) -> bool:
    """Whether a part of a module can be copied; modules, and methods of modules, are not asked."""
    if isinstance(getattr(part, "__self__", part), (nn.Module, Tensor)):
        return True
    try:
        copy.deepcopy(part)
    except Exception:  # whatever a foreign part may raise
        return False
    return True


def _at_fault(network: nn.Module) -> str:
    """The innermost module that cannot be copied."""
    for name, module in reversed(list(network.named_modules())):
        try:
            copied(module)
        except Exception:  # whatever a foreign part may raise
            return f"{name or 'the network'} ({type(module).__name__})"
    return "what holds its modules together"
