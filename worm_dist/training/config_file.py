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


class _UnfitError(yaml.MarkedYAMLError):
    """Valid YAML that is not fit for settings."""


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that reads ``1e-4`` as a float, refuses a key that is given twice, and
    locates values of the wrong type."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _mistake(key, f"key given twice: {shortened(key.value)}")
            seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if re.search("[\ud800-\udfff]", node.value):
            raise _mistake(node, f"{node.value!a} is not valid text: it contains a lone surrogate")
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
        path: a YAML file.
        overrides: pairs of a dotted key and its new value as YAML text; later pairs win.

    Raises:
        ConfigError: the file cannot be read, or its settings are wrong; lists all mistakes.
    """
    try:
        settings = _parsed(path.read_bytes().decode(), str(path))
        if settings is None:
            settings = {}
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise ConfigError(f"{path}: settings must be written as 'key: value'")
        for key, text in overrides:
            settings = merge(settings, _nested(key, text))
        return RunConfig(**settings)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: it is not written in UTF-8: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: the settings are nested too deeply") from error


def _nested(key: str, text: str) -> dict[str, Any]:
    name = f"--{shortened(key if key.isprintable() else ascii(key), 100)}"
    if not key.isprintable():
        raise ConfigError(f"{name}: unknown key")
    value = _parsed(text, name)
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _parsed(text: str, where: str) -> Any:
    """Parse the single YAML document in a text.

    Args:
        text: YAML.
        where: the source of the text, for messages.

    Raises:
        ConfigError: the text is not one valid document.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        kind = "" if isinstance(error, _UnfitError) else "not YAML: "
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        reason = shortened(f"{error.problem or error.context}")
        raise ConfigError(f"{where}: {kind}{line}{reason}") from error
    except yaml.YAMLError as error:
        reason = shortened(" ".join(str(error).split()))
        raise ConfigError(f"{where}: not YAML: {reason}") from error


def _mistake(node: yaml.Node, problem: str) -> _UnfitError:
    return _UnfitError(problem=problem, problem_mark=node.start_mark)
