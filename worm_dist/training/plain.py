"""Plain values: what can be told to other ranks, hashed, written as JSON and read back equal."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["plain"]

_DEEPEST = 20


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """The mapping, if it holds nothing but plain values.

    Raises:
        ValueError: it holds something else; says where.
    """
    _require_plain(value, [])
    return value


def _require_plain(value: Any, place: list[str]) -> None:
    wrong = _what_is_wrong(value, len(place))
    if wrong:
        raise ValueError(f"{'.'.join(place)}: {wrong}")
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{'.'.join(place)}: the key {key!r} is no text")
            _require_plain(part, [*place, key])
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _require_plain(part, [*place, str(number)])


def _what_is_wrong(value: Any, depth: int) -> str | None:
    if depth > _DEEPEST:
        return f"nested deeper than {_DEEPEST}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number of more than 64 bits"
    if value is not None and not isinstance(value, (bool, int, float, str, list, dict)):
        return f"{type(value).__name__} is neither number, text, list nor mapping"
    return None
