"""Synchronisations: count where host code would wait for a GPU, on a machine without one.

The parameters of a network become instances of a subclass, as does whatever is computed from them
or is put where they are.  What a host can learn only by waiting for the device is counted: values,
and sizes that depend on values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["as_on_device", "on_device", "synchronisations"]

_WAITING = {
    "__bool__", "__float__", "__index__", "__int__", "allclose", "argwhere", "bincount", "cpu",
    "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy", "tolist", "unique",
}  # fmt: skip

_counter: Counter[str] = Counter()


class _OnDevice(Tensor):
    """A tensor in host memory that stands for one in a GPU's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if _waits(name, args, kwargs):
            _counter[name] += 1
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        return on_device(result)


class _OnDeviceParameter(_OnDevice, nn.Parameter):
    """A parameter of this kind: it stays the same object."""

    __torch_function__ = _OnDevice.__torch_function__


class _Placement(TorchFunctionMode):
    """Whatever is put on the network's device becomes a tensor of this kind too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        if any(isinstance(value, torch.device) for value in given):
            return on_device(result)
        return result


def as_on_device(network: nn.Module) -> None:
    """Let the parameters of a network stand for tensors on a GPU from now on."""
    for parameter in network.parameters():
        parameter.__class__ = _OnDeviceParameter


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """The number of waits so far in the context, by function."""
    _counter.clear()
    with _Placement():
        yield _counter


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name == "to":
        # A device that was asked for is the network's; only "cpu" by name is the host.
        return "cpu" in (*args[1:], kwargs.get("device"))
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)
    return name in _WAITING


def on_device(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result if isinstance(result, _OnDevice) else result.as_subclass(_OnDevice)
    if type(result) in (list, tuple):
        return type(result)(on_device(part) for part in result)
    return result
