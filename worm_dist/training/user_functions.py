"""The functions of the user that settings name: found before ranks wait for each other."""

from __future__ import annotations

from ..user_function import is_user_function, require_user_function, source_of
from .run_config import RunConfig

__all__ = ["require_user_functions", "user_sources"]


def require_user_functions(config: RunConfig) -> None:
    """Import the functions for data and model, if the settings name any, without calling them.

    Raises:
        ConfigError: one cannot be imported, or takes other arguments.
    """
    if is_user_function(config.data.name):
        require_user_function(config.data.name, "data.name", config.data)
    if is_user_function(config.model.name):
        given = {**config.model.arguments, "num_classes": 1, "in_channels": 1}
        require_user_function(config.model.name, "model.name", **given)


def user_sources(config: RunConfig) -> dict[str, bytes]:
    """The content of the files of these functions, by the functions' names."""
    names = (config.data.name, config.model.name)
    return {name: source_of(name) for name in names if is_user_function(name)}
