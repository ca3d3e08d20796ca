"""Mutations: content that was changed at random, for hypothesis."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

__all__ = ["RAW", "fuzzed", "other_bytes", "other_json", "other_tensors", "other_trees"]

_SECONDS_FOR_ONE = 20
"""It takes milliseconds, but the machine may be busy."""
RAW = "RAW"
"""Stands in a tree for text that no value is written as."""

fuzzed = settings(
    deadline=1000 * _SECONDS_FOR_ONE,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container with a key in it."""
    keys = (
        list(node) if isinstance(node, dict) else range(len(node) if isinstance(node, list) else 0)
    )
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


@st.composite
def other_trees(draw: st.DrawFn, tree: Any, values: Sequence[Any], keys: Sequence[Any]) -> Any:
    """Values and keys replaced, removed and doubled.

    Args:
        tree: lists, mappings and plain values; it stays as it is.
        values: to put in its place.
        keys: to put beside those of mappings.
    """
    changed = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(_places(changed)))
        how = draw(st.sampled_from(["replace", "take", "remove", "double", "raw", "key", "count"]))
        if how == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(values)))
        elif how == "take":
            other, from_key = draw(st.sampled_from(_places(changed)))
            parent[key] = copy.deepcopy(other[from_key])
        elif how == "remove" and parent is not changed:
            del parent[key]
        elif how == "double" and isinstance(parent, list) and parent is not changed:
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == "raw":
            parent[key] = RAW
        elif how == "key" and isinstance(parent, dict):
            parent[draw(st.sampled_from(keys))] = parent[key]
        elif type(parent[key]) is int:
            parent[key] += draw(st.integers(-9, 9))
    return changed[0]


@st.composite
def other_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bits flipped; bytes replaced, put in and taken out."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["flip", "replace", "put in", "take out"]))
        if how == "flip" and changed:
            changed[begin] ^= 1 << draw(st.integers(0, 7))
        elif how == "take out":
            del changed[begin : begin + draw(st.integers(1, 40))]
        else:
            some = draw(st.binary(max_size=20))
            changed[begin : begin + (len(some) if how == "replace" else 0)] = some
    return bytes(changed)


_RAW_JSON = [b"NaN", b"1e999", b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"\xff", b'"\\ud800"']


@st.composite
def other_json(
    draw: st.DrawFn, content: bytes, values: Sequence[Any], keys: Sequence[Any]
) -> bytes:
    """Of the tree, and raw text that is no JSON or too much of it."""
    tree = draw(other_trees(json.loads(content), values, keys))
    return json.dumps(tree).encode().replace(f'"{RAW}"'.encode(), draw(st.sampled_from(_RAW_JSON)))


@st.composite
def other_tensors(
    draw: st.DrawFn, content: bytes, values: Sequence[Any], keys: Sequence[Any]
) -> bytes:
    """Of a file in the safetensors format: the header as JSON, its length, or the data."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if draw(st.booleans()):
        header = draw(other_json(header, values, keys))
    said = draw(st.sampled_from([len(header)] * 4 + [0, 1, len(header) + 8, 2**63, 2**64 - 1]))
    if draw(st.booleans()):
        data = draw(other_bytes(data))
    return said.to_bytes(8, "little") + header + data
