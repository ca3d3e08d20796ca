"""The packages that a run needs beside those of the engine."""

from __future__ import annotations

from ..extras import require_extras
from ..search.elbow import extras_of_rule
from .run_config import RunConfig

__all__ = ["require_packages"]


def require_packages(config: RunConfig) -> None:
    """Find the packages of a run, before ranks wait for each other; none is imported.

    Raises:
        ConfigError: packages are missing; says which extras bring them.
    """
    needed = {"train": "train"}
    if config.data.name == "digits":
        needed["digits"] = "data.name: 'digits'"
    require_extras({**needed, **extras_of_rule(config.search)})
