"""Encodes a nested state as JSON, with an entry in place of each tensor.

null, true, false, strings, integers of any size, finite floats and lists are encoded as themselves.
Everything else is an object with one of these keys:

    {"dict": [[key, value], ...]}        keys are strings or integers
    {"tuple": [value, ...]}
    {"float": "7ff8000000000000"}        NaN and infinities, by their bits
    {"tensor": name, ...}                the tensor of that name in the safetensors file
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError
from .sharded_tensor import AnyTensor

__all__ = ["decode", "encode"]

_MAX_DEPTH = 100


def encode(state: Any, encode_tensor: Callable[[str, AnyTensor], dict[str, Any]]) -> bytes:
    """Encode a state as JSON.

    Args:
        state: nested dicts (ordered ones become plain), lists and tuples of tensors, sharded ones
            among them, numbers, strings, booleans and None.
        encode_tensor: function that returns the JSON object for a tensor, from its dotted key and
            the tensor; the object must have the key ``tensor``.

    Raises:
        CheckpointError: the state contains something else; the message names the key.
    """
    return json.dumps(_encode(state, "", _MAX_DEPTH, encode_tensor), allow_nan=False).encode()


def decode(content: bytes, decode_tensor: Callable[[dict[str, Any]], AnyTensor], path: Path) -> Any:
    """Decode a state that was encoded by ``encode``.

    Args:
        content: the JSON text.
        decode_tensor: function that returns the tensor for an object with the key ``tensor``; it
            may raise CheckpointError.
        path: path of the file, for messages.

    Raises:
        CheckpointError: ``encode`` does not write such content.
    """
    try:
        node = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: wanted a state in JSON, found {error}") from error
    return _Decoder(decode_tensor, path).value(node, _MAX_DEPTH)


def _encode(
    state: Any, key: str, depth: int, encode_tensor: Callable[[str, AnyTensor], dict[str, Any]]
) -> Any:
    kind = type(state)
    if isinstance(state, AnyTensor):
        return encode_tensor(key, state)
    # Exact types: a subclass, such as numpy's float, would be decoded as another type.
    if state is None or kind in (bool, int, str) or (kind is float and math.isfinite(state)):
        return state
    if kind is float:
        return {"float": struct.pack(">d", state).hex()}
    if depth == 0:
        raise CheckpointError(f"{_format(key)}: states may be nested at most {_MAX_DEPTH} deep")
    if kind in (list, tuple):
        nodes = [
            _encode(value, f"{key}.{i}", depth - 1, encode_tensor) for i, value in enumerate(state)
        ]
        return nodes if kind is list else {"tuple": nodes}
    if kind in (dict, OrderedDict):
        for name in state:
            if type(name) not in (str, int):
                raise CheckpointError(
                    f"{_format(key)}: keys may be strings and integers, but {name!r} is a "
                    f"{type(name).__name__}"
                )
        return {
            "dict": [
                [name, _encode(value, f"{key}.{name}", depth - 1, encode_tensor)]
                for name, value in state.items()
            ]
        }
    raise CheckpointError(
        f"{_format(key)}: a {kind.__module__}.{kind.__qualname__} cannot be saved; use dicts, "
        "lists, tuples, tensors, numbers, strings, booleans and None"
    )


def _format(key: str) -> str:
    return f"state{key[:200]}"


class _Decoder:
    def __init__(self, decode_tensor: Callable[[dict[str, Any]], AnyTensor], path: Path) -> None:
        self._decode_tensor = decode_tensor
        self._path = path

    def value(self, node: Any, depth: int) -> Any:
        if isinstance(node, float) and not math.isfinite(node):
            self._refuse("a float that JSON can hold", node)
        if not isinstance(node, (dict, list)):
            return node
        if depth == 0:
            self._refuse(f"at most {_MAX_DEPTH} levels", "more")
        if isinstance(node, list):
            return [self.value(value, depth - 1) for value in node]
        if "tensor" in node:
            return self._decode_tensor(node)
        match node:
            case {"tuple": list(nodes)} if len(node) == 1:
                return tuple(self.value(value, depth - 1) for value in nodes)
            case {"dict": list(pairs)} if len(node) == 1:
                return self._dict(pairs, depth)
            case {"float": str(digits)} if len(node) == 1:
                return self._float(digits)
        self._refuse("a dict, a tuple, a float or a tensor", f"an object with {list(node)}")

    def _dict(self, pairs: list[Any], depth: int) -> dict[Any, Any]:
        state: dict[Any, Any] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)):
                self._refuse("a key and a value", pair)
            if pair[0] in state:
                self._refuse("every key once", pair[0])
            state[pair[0]] = self.value(pair[1], depth - 1)
        return state

    def _float(self, digits: str) -> float:
        try:
            (value,) = struct.unpack(">d", bytes.fromhex(digits))
        except (ValueError, struct.error):
            self._refuse("16 hexadecimal digits", digits)
        assert isinstance(value, float)
        return value

    def _refuse(self, wanted: str, found: Any) -> NoReturn:
        raise CheckpointError(f"{self._path}: wanted {wanted}, found {str(found)[:100]}")
