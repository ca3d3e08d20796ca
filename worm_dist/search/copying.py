"""Copying: a network's copy to try things on, so that the network itself is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import ConfigError
from .forward import undisturbed
from .nested import tensors_in

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
    the graph of tensors that it keeps is left behind.

    torch refuses to copy tensors that have a graph.  Networks keep such: a feature for a loss of
    its own, a weight that ``weight_norm`` or ``prune`` has computed.
    """
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone()
        for module in network.modules()
        for tensor in tensors_in(vars(module))
        if not tensor.is_leaf
    }
    try:
        return copy.deepcopy(network, dict(memo))
    except Exception:  # whatever a foreign part may raise
        for module in network.modules():
            memo |= {id(value): value for value in vars(module).values() if not _copies(value)}
        return copy.deepcopy(network, memo)


def _copies(value: object) -> bool:
    """Whether an attribute of a module can be copied; what holds its tensors and modules can."""
    if isinstance(value, (dict, nn.Module)) or any(True for _ in tensors_in(value)):
        return True
    try:
        copy.deepcopy(value)
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
