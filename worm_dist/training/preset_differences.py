"""Differences of presets: the settings that another preset changes in a run, and only these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..presets import PRESETS
from .ineffective_settings import reasons_against
from .run_config import RunConfig

__all__ = ["NO_EFFECT", "PresetDifferences", "preset_differences"]

NO_EFFECT = "–"
_SEARCHES = "search.enabled"


@dataclass(frozen=True)
class PresetDifferences:
    """The settings in which the presets differ, given what a settings file sets.

    Attributes:
        presets: the names of the presets, which fit the file.
        rows: by dotted key, the value under each preset as text; ``NO_EFFECT`` where the setting
            cannot act.
        refused: by name of each other preset, why the file contradicts it.
    """

    presets: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    refused: Mapping[str, str]

    def between(self, one: str, other: str) -> list[str]:
        """The settings that act under both presets and differ; those that follow from them, such as
        the elbow of a search that does not truncate, are left out."""
        first, second = self.presets.index(one), self.presets.index(other)
        pairs = {key: {values[first], values[second]} for key, values in self.rows.items()}
        return [key for key, pair in pairs.items() if len(pair) > 1 and NO_EFFECT not in pair]


def preset_differences(settings: Mapping[str, Any]) -> PresetDifferences:
    """Compare the presets under the same settings file.

    Args:
        settings: the file's settings, nested; what it sets itself is the same under all presets.

    Raises:
        ConfigError: the settings are wrong under their own preset.
    """
    own = RunConfig(**settings).preset
    configs, refused = {}, {}
    for name in PRESETS:
        try:
            configs[name] = RunConfig(**{**settings, "preset": name})
        except ConfigError as error:
            if name == own:
                raise
            refused[name] = str(error).splitlines()[0]
    columns = [_effective(config) for config in configs.values()]
    rows = {key: [column[key] for column in columns] for key in columns[0] if key != "preset"}
    # Without a search no setting of one acts: one row says so.
    searches = [config.search.enabled for config in configs.values()]
    differing = {
        key: values
        for key, values in rows.items()
        if len({value for value, here in zip(values, searches) if here}) > 1
        or (key == _SEARCHES and len({*values}) > 1)
    }
    return PresetDifferences(tuple(configs), differing, refused)


def _effective(config: RunConfig) -> dict[str, str]:
    without_effect = reasons_against(config)
    return {
        key: NO_EFFECT if key in without_effect else _text(value)
        for key, value in config.flat().items()
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)
