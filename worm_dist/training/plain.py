"""Plain values: values that can be sent to other ranks, hashed and round-tripped through JSON."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["plain"]

_DEEPEST = 20


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping if it holds plain values only.

    Raises:
        ValueError: a value is not plain; names its path.
    """
    _require_plain(value, [])
    return value


def _require_plain(value: Any, path: list[str]) -> None:
    problem = _problem_of(value, len(path))
    if problem:
        raise ValueError(f"{'.'.join(path)}: {problem}")
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{'.'.join(path)}: the key {key!r} is not a string")
            _require_plain(part, [*path, key])
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _require_plain(part, [*path, str(index)])


def _problem_of(value: Any, depth: int) -> str | None:
    if depth > _DEEPEST:
        return f"nested deeper than {_DEEPEST}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number of more than 64 bits"
    if value is not None and not isinstance(value, (bool, int, float, str, list, dict)):
        return f"{type(value).__name__} is not a number, string, list or mapping"
    return None
