"""Config file: a run's settings from YAML, with single values replaced on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import merge
from ..errors import ConfigError
from .run_config import RunConfig

__all__ = ["read_run_config"]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-4`` as a number, and does not let a key hide its namesake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key given twice near line {line}: {', '.join(twice)}")
        return mapping


_Loader.add_implicit_resolver(  # YAML 1.1 wants a dot in every float
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def read_run_config(path: Path, replaced: Sequence[tuple[str, str]]) -> RunConfig:
    """Read a run's settings.

    Args:
        path: a YAML file.
        replaced: pairs of a dotted key and its new value as YAML text, later ones win.

    Raises:
        ConfigError: the file cannot be read, or with all mistakes in it at once.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{path}: settings must be written as 'key: value'")
    for key, text in replaced:
        settings = merge(settings, _nested(key, text))
    return RunConfig(**settings)


def _nested(key: str, text: str) -> dict[str, Any]:
    try:
        value: Any = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: not a YAML value: {text!r}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value
