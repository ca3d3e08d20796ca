"""Mutations of leaves: every value of a nested state changed in every way, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Mutation", "mutations"]

_VALUES: tuple[Any, ...] = (None, "x", -1, math.nan, [], torch.ones(2, 3))
_FEW = 2
"""So many items of a long list stand for all."""


class Mutation(NamedTuple):
    """A state in which one value is another.

    Attributes:
        path: its keys.
        how: it was changed.
        state: the state; it shares everything else with the original.
    """

    path: tuple[Any, ...]
    how: str
    state: Any

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


def mutations(state: Any) -> Iterator[Mutation]:
    """Each value, container or leaf, removed or replaced by one of another type; of each tensor
    another shape, another dtype, NaN and infinity too."""
    for path, value in _places(state, ()):
        yield Mutation(path, "removed", _with(state, path, _REMOVED))
        for other in _VALUES:
            if type(other) is not type(value):
                yield Mutation(path, f"{str(other)[:6]}", _with(state, path, other))
        if isinstance(value, Tensor):
            for how, changed in _tensors(value).items():
                yield Mutation(path, how, _with(state, path, changed))


_REMOVED = object()


def _tensors(value: Tensor) -> dict[str, Tensor]:
    flat = value.flatten()
    found = {
        "longer": torch.cat([flat, flat.new_zeros(2)]),
        "dtype": value.to(torch.int32 if value.dtype == torch.float64 else torch.float64),
    }
    if value.is_floating_point():
        found |= {how: value.clone() for how in ("nan", "inf")}
        for how in ("nan", "inf"):
            found[how].view(-1)[-1] = float(how)
    return found


def _places(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items: list[tuple[Any, Any]] = list(node.items()) if isinstance(node, dict) else []
    if isinstance(node, (list, tuple)):
        items = list(enumerate(node))[: _FEW if len(node) > 50 else None]
    for key, value in items:
        yield (*path, key), value
        yield from _places(value, (*path, key))


def _with(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy along the path alone."""
    if not path:
        return value
    key, *rest = path
    copied = dict(node) if isinstance(node, dict) else list(node)
    copied[key] = _with(node[key], tuple(rest), value)
    if copied[key] is _REMOVED:
        del copied[key]
    return tuple(copied) if isinstance(node, tuple) else copied
