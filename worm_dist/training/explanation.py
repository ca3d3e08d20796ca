"""Explanation: prints what a preset decides in a run, and what another one would change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..terminal import console_of
from .config_file import read_settings
from .preset_differences import preset_differences
from .run_config import RunConfig

__all__ = ["explain"]


def explain(path: Path, overrides: Sequence[tuple[str, str]]) -> int:
    """Print the settings in which the presets differ under a settings file; return the exit code,
    0.

    Args:
        path: a YAML file.
        overrides: pairs of a dotted key and its new value as YAML text.

    Raises:
        ConfigError: the file cannot be read, or its settings are wrong.
    """
    settings = read_settings(path, overrides)
    own = RunConfig(**settings).preset
    differences = preset_differences(settings)
    console = console_of()
    console.print(f"{path}: preset {own}")
    console.print("What the presets change here; all other settings are the same under each:")
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("setting", no_wrap=True)
    for name in differences.presets:
        table.add_column(f"{name} *" if name == own else name, no_wrap=True)
    for key, values in differences.rows.items():
        table.add_row(key, *values)
    console.print(table)
    console.print()
    console.print("* the preset of this run; – has no effect under this preset")
    for name in differences.presets:
        if name != own:
            keys = differences.between(own, name)
            console.print(f"--preset {name} changes {', '.join(keys) or 'nothing'}", soft_wrap=True)
    for name, reason in differences.refused.items():
        console.print(f"--preset {name}: refused: {reason}")
    return 0
