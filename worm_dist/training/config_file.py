"""Settings of a run from a YAML file, with overrides from the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import merge, shortened
from ..errors import ConfigError
from .run_config import RunConfig

__all__ = ["read_run_config"]

_MOST_BYTES, _MOST_VALUES, _LONGEST, _DEEPEST = 100_000, 2_000, 3_000, 20
"""Limits of a file: size in bytes, number of values with aliases expanded, characters of one value,
nesting depth.  Far above what settings need, and low enough to parse quickly."""


class _UnfitError(yaml.MarkedYAMLError):
    """Valid YAML that exceeds the limits of a settings file."""


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that reads ``1e-4`` as a float and locates values of the wrong type."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; stop at the limits, before time or the stack runs out."""
        self._count += 1
        self._depth += 1
        if self._count > _MOST_VALUES or self._depth > _DEEPEST + 1:
            too = "deep" if self._depth > _DEEPEST else "many"
            problem = f"too {too}; settings are at most {_MOST_VALUES} values, {_DEEPEST} deep"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _UnfitError(problem=problem, problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
            # PyYAML's own constructors raise any of these for a malformed value.
            kind = node.tag.rpartition(":")[2]
            raise _mistake(node, f"not a valid {kind}: {shortened(repr(node.value))}") from error


_Loader.add_implicit_resolver(  # YAML 1.1 requires a dot in every float
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def read_run_config(path: Path, overrides: Sequence[tuple[str, str]]) -> RunConfig:
    """Read a run's settings.

    Args:
        path: a YAML file of at most 100,000 bytes.
        overrides: pairs of a dotted key and its new value as YAML text; later pairs win.

    Raises:
        ConfigError: the file cannot be read, or its settings are wrong; lists all mistakes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        settings = _parsed(content.decode(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: it is not written in UTF-8: {error}") from error
    if settings is None:
        settings = {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{path}: settings must be written as 'key: value'")
    for key, text in overrides:
        settings = merge(settings, _nested(key, text))
    return RunConfig(**settings)


def _nested(key: str, text: str) -> dict[str, Any]:
    name = f"--{shortened(key if key.isprintable() else ascii(key), 100)}"
    parts = key.split(".")
    if len(parts) > _DEEPEST or not key.isprintable():
        raise ConfigError(f"{name}: unknown key")
    value = _parsed(text, name)
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _parsed(text: str, where: str) -> Any:
    """Parse the single YAML document in a text.

    Args:
        text: YAML.
        where: the source of the text, for messages.

    Raises:
        ConfigError: the text is not one valid document, or exceeds the limits.
    """
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{where}: longer than {_MOST_BYTES} bytes; settings are short")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _require_plain(root)
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        kind = "" if isinstance(error, _UnfitError) else "not YAML: "
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        reason = shortened(f"{error.problem or error.context}")
        raise ConfigError(f"{where}: {kind}{line}{reason}") from error
    except yaml.YAMLError as error:
        reason = shortened(" ".join(str(error).split()))
        raise ConfigError(f"{where}: not YAML: {reason}") from error


def _require_plain(root: yaml.Node) -> None:
    """Raise if the values exceed the limits or a key is given twice.

    Every copy that aliases make counts: a few lines can expand to more values than fit in memory,
    and a value that contains itself expands without end.
    """
    pending, count = [(root, 0)], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if count + len(pending) > _MOST_VALUES or depth > _DEEPEST:
            raise _mistake(node, "aliases repeat too many values in it")
        if isinstance(node, yaml.MappingNode):
            _require_unique_keys(node)
            pending += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(part, depth + 1) for part in node.value]
        elif len(node.value) > _LONGEST:
            raise _mistake(node, f"a value of more than {_LONGEST} characters")
        elif re.search("[\ud800-\udfff]", node.value):
            raise _mistake(node, f"{node.value!a} is not valid text: it contains a lone surrogate")


def _require_unique_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            raise _mistake(key, f"key given twice: {shortened(key.value)}")
        seen.add(key.value)


def _mistake(node: yaml.Node, problem: str) -> _UnfitError:
    return _UnfitError(problem=problem, problem_mark=node.start_mark)
