"""Calls: the newest inputs of a network, in plain values and back.

Statistics are estimated anew from them at the draw, so a run that is resumed shortly before it
needs them too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .statistics import Call

__all__ = ["calls_from", "plain_calls"]

logger = logging.getLogger(__name__)

_LEAVES = (bool, int, float, str, type(None))


def plain_calls(calls: Sequence[Call]) -> list[dict[str, Any]] | None:
    """Dicts, lists, tuples, numbers, strings and tensors; None, with a warning, if the network is
    called with anything else."""
    plain = []
    for positional, keywords, (device, dtype, autocast) in calls:
        on_cpu: list[bool] = []

        def noted(tensor: Tensor, on_cpu: list[bool] = on_cpu) -> Tensor:
            on_cpu.append(tensor.is_cpu)
            return tensor.detach()

        try:
            arguments = _mapped([list(positional), dict(keywords)], noted)
        except TypeError as error:
            logger.warning(
                "inputs that hold a %s are not in the engine's state: resumed, it has to see "
                "others before BatchNorm statistics can be estimated at a draw",
                error,
            )
            return None
        plain.append(
            {
                "arguments": arguments,
                "on_cpu": on_cpu,
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "autocast": autocast,
            }
        )
    return plain


def calls_from(plain: Sequence[dict[str, Any]], device: torch.device) -> list[Call]:
    """The calls again, with the tensors on this device that were not on the CPU."""
    calls: list[Call] = []
    for call in plain:
        on_cpu = iter(call["on_cpu"])

        def placed(tensor: Tensor, on_cpu: Any = on_cpu) -> Tensor:
            return tensor if next(on_cpu) else tensor.to(device)

        positional, keywords = _mapped(call["arguments"], placed)
        precision = call["device"], getattr(torch, call["dtype"]), call["autocast"]
        calls.append((tuple(positional), keywords, precision))
    return calls


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with every tensor replaced.

    Raises:
        TypeError: naming the type of what is not plain.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return function(value)
    if kind in _LEAVES:
        return value
    if kind in (list, tuple):
        return kind(_mapped(part, function) for part in value)
    if kind is dict and all(type(key) in (str, int) for key in value):
        return {key: _mapped(part, function) for key, part in value.items()}
    raise TypeError(kind.__name__)
