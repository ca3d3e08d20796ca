"""Skeleton: a nested state as JSON, with a note in the place of every tensor.

What JSON has stands for itself: null, true, false, strings, whole numbers of any size, finite
floats and lists.  Everything else is an object of one kind:

    {"dict": [[key, value], ...]}        keys are strings or whole numbers
    {"tuple": [value, ...]}
    {"float": "7ff8000000000000"}        NaN and the infinities, by their bits
    {"tensor": name, ...}                the tensor of that name in the file beside it
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ..errors import CheckpointError

__all__ = ["decode", "encode"]

_DEEPEST = 100


def encode(state: Any, note: Callable[[str, Tensor], dict[str, Any]]) -> bytes:
    """The state as JSON.

    Args:
        state: nested dicts (ordered ones become plain), lists and tuples of tensors, numbers,
            strings, booleans and None.
        note: gives the object that stands for a tensor, from its dotted place and the tensor.

    Raises:
        CheckpointError: the state holds something else; the message says where.
    """
    return json.dumps(_node(state, "", _DEEPEST, note), allow_nan=False).encode()


def decode(content: bytes, tensor: Callable[[dict[str, Any]], Tensor], path: Path) -> Any:
    """The state that ``encode`` was given.

    Args:
        content: JSON.
        tensor: gives the tensor for an object with the key ``tensor``; it may raise
            CheckpointError.
        path: of the file, for messages.

    Raises:
        CheckpointError: the content is not what ``encode`` writes.
    """
    try:
        node = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: wanted a state in JSON, found {error}") from error
    return _Reader(tensor, path).value(node, _DEEPEST)


def _node(state: Any, place: str, depth: int, note: Callable[[str, Tensor], dict[str, Any]]) -> Any:
    kind = type(state)
    if isinstance(state, Tensor):
        return note(place, state)
    # Exact types: a subclass, such as numpy's float, would come back as something else.
    if state is None or kind in (bool, int, str) or (kind is float and math.isfinite(state)):
        return state
    if kind is float:
        return {"float": struct.pack(">d", state).hex()}
    if depth == 0:
        raise CheckpointError(f"{_shown(place)}: states may be nested {_DEEPEST} deep, no more")
    if kind in (list, tuple):
        nodes = [_node(value, f"{place}.{i}", depth - 1, note) for i, value in enumerate(state)]
        return nodes if kind is list else {"tuple": nodes}
    if kind in (dict, OrderedDict):
        for key in state:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{_shown(place)}: keys may be strings and whole numbers, and {key!r} is a "
                    f"{type(key).__name__}"
                )
        return {
            "dict": [
                [key, _node(value, f"{place}.{key}", depth - 1, note)]
                for key, value in state.items()
            ]
        }
    raise CheckpointError(
        f"{_shown(place)}: a {kind.__module__}.{kind.__qualname__} cannot be saved; use dicts, "
        "lists, tuples, tensors, numbers, strings, booleans and None"
    )


def _shown(place: str) -> str:
    return f"state{place[:200]}"


class _Reader:
    def __init__(self, tensor: Callable[[dict[str, Any]], Tensor], path: Path) -> None:
        self._tensor = tensor
        self._path = path

    def value(self, node: Any, depth: int) -> Any:
        if isinstance(node, float) and not math.isfinite(node):
            self._refuse("a float that JSON can hold", node)
        if not isinstance(node, (dict, list)):
            return node
        if depth == 0:
            self._refuse(f"at most {_DEEPEST} levels", "more")
        if isinstance(node, list):
            return [self.value(value, depth - 1) for value in node]
        if "tensor" in node:
            return self._tensor(node)
        match node:
            case {"tuple": list(nodes)} if len(node) == 1:
                return tuple(self.value(value, depth - 1) for value in nodes)
            case {"dict": list(pairs)} if len(node) == 1:
                return self._dict(pairs, depth)
            case {"float": str(digits)} if len(node) == 1:
                return self._float(digits)
        self._refuse("a dict, a tuple, a float or a tensor", f"an object with {list(node)}")

    def _dict(self, pairs: list[Any], depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)):
                self._refuse("a key and a value", pair)
            if pair[0] in found:
                self._refuse("every key once", pair[0])
            found[pair[0]] = self.value(pair[1], depth - 1)
        return found

    def _float(self, digits: str) -> float:
        try:
            (value,) = struct.unpack(">d", bytes.fromhex(digits))
        except (ValueError, struct.error):
            self._refuse("16 hexadecimal digits", digits)
        assert isinstance(value, float)
        return value

    def _refuse(self, wanted: str, found: Any) -> NoReturn:
        raise CheckpointError(f"{self._path}: wanted {wanted}, found {str(found)[:100]}")
