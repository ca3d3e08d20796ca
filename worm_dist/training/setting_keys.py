"""Dotted keys of settings: ``search.elbow.margin`` for ``margin`` in ``elbow`` in ``search``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, get_args, get_origin

from pydantic import JsonValue

from ..errors import ConfigError
from ..mistakes import shortened
from ..settings import Settings
from .run_config import RunConfig

__all__ = ["nested", "with_change"]

_Path: TypeAlias = tuple[Any, ...]
_Part: TypeAlias = type[Settings]


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every dotted key as nested mappings.

    Raises:
        ConfigError: a setting is given both ways.
    """
    seen: set[_Path] = set()
    result: dict[str, Any] = {}
    for path, value in _values(settings, RunConfig):
        for twice in [path[:length] for length in range(1, len(path) + 1)]:
            if twice in seen:
                key = shortened(".".join(map(str, twice)), 100)
                raise ConfigError(f"{key}: given twice, as a dotted key and nested")
        seen.add(path)
        result = _assigned(result, path, value)
    return result


def with_change(settings: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The settings with another value of one of them.

    Args:
        settings: nested settings, which are not changed.
        key: a dotted key.
        value: the value, which takes the place of the old one.  A mapping for a part, such as
            ``search``, changes only those of its settings that it has.
    """
    result = dict(settings)
    for path, new in _values({key: value}, RunConfig):
        result = _assigned(result, path, new)
    return result


def _values(settings: Mapping[Any, Any], part: _Part | None) -> Iterator[tuple[_Path, Any]]:
    """Every setting that is given, by its path."""
    for key, value in settings.items():
        path = _path(key, part)
        below = part
        for name in path:
            below = _part_below(below, name)
        if below is not None and isinstance(value, Mapping) and value:
            for path_below, setting in _values(value, below):
                yield path + path_below, setting
        else:
            yield path, value


def _path(key: Any, part: _Part | None) -> _Path:
    """The path of a dotted key.

    Below a mapping of patterns, whose own keys have dots, all that follows is one key.
    """
    if part is None or not isinstance(key, str):
        return (key,)
    names = key.split(".")
    for number, name in enumerate(names[:-1]):
        if part is not None and name in part.model_fields:
            annotation = part.model_fields[name].annotation
            if get_origin(annotation) is dict and get_args(annotation)[1] is not JsonValue:
                return (*names[: number + 1], ".".join(names[number + 1 :]))
        part = _part_below(part, name)
    return tuple(names)


def _part_below(part: _Part | None, name: Any) -> _Part | None:
    field = None if part is None else part.model_fields.get(name)
    annotation = None if field is None else field.annotation
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return None


def _assigned(settings: Mapping[Any, Any], path: _Path, value: Any) -> dict[Any, Any]:
    name, *rest = path
    if rest:
        below = settings.get(name)
        value = _assigned(below if isinstance(below, Mapping) else {}, tuple(rest), value)
    return {**settings, name: value}
