"""Settings of a run from a YAML file, with overrides from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..mistakes import shortened
from .run_config import RunConfig
from .setting_keys import nested, with_change
from .yaml_text import parse_yaml

__all__ = ["read_run_config", "read_settings"]


def read_run_config(path: Path, overrides: Sequence[tuple[str, str]]) -> RunConfig:
    """Read a run's settings; see ``read_settings``.

    Raises:
        ConfigError: the file cannot be read, or its settings are wrong; lists all mistakes.
    """
    return RunConfig(**read_settings(path, overrides))


def read_settings(path: Path, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Read what a file and the command line set of a run, nested; the rest is the preset's.

    Args:
        path: a YAML file, whose keys may be dotted or nested.
        overrides: pairs of a dotted key and its new value as YAML text; later pairs win.  A budget
            replaces the file's ``search.prune_ratio``, and the other way round.

    Raises:
        ConfigError: the file cannot be read, or is no mapping.
    """
    try:
        settings = parse_yaml(path.read_bytes().decode(), str(path))
        if settings is None:
            settings = {}
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise ConfigError(f"{path}: settings must be written as 'key: value'")
        changes = [(key, _value(key, text)) for key, text in overrides]
        settings = _without_replaced(nested(settings), _changed({}, changes))
        return _changed(settings, changes)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: it is not written in UTF-8: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: the settings are nested too deeply") from error


def _changed(settings: dict[str, Any], changes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in changes:
        settings = with_change(settings, key, value)
    return settings


def _without_replaced(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings without that of ``search.prune_ratio`` and ``search.budget`` in whose
    place the command line gives the other."""
    here, there = settings.get("search"), changes.get("search")
    if not isinstance(here, Mapping) or not isinstance(there, Mapping):
        return settings
    replaced = {"budget": "prune_ratio", "prune_ratio": "budget"}
    gone = {replaced[key] for key in there if key in replaced} - there.keys()
    return {**settings, "search": {key: here[key] for key in here if key not in gone}}


def _value(key: str, text: str) -> Any:
    name = f"--{shortened(key if key.isprintable() else ascii(key), 100)}"
    if not key.isprintable():
        raise ConfigError(f"{name}: unknown key")
    return parse_yaml(text, name)
