"""Tensors in nested inputs and outputs of a network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["mapped", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over all tensors in a nested value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the nested value with ``function`` applied to every tensor.

    Containers (mappings, tuples, lists) keep their types; all other values are left as they are.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        same: Any = copy.copy(value)
        for name, part in value.items():
            same[name] = mapped(part, function)
        return same
    if isinstance(value, (tuple, list)):
        parts = [mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
