"""Template of a settings file, from the classes of the settings: it cannot say what they do not."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from ..config import WormParts
from ..settings import Settings
from .run_config import RunConfig
from .yaml_text import parse_yaml

__all__ = ["TO_FILL_IN", "settings_template"]

TO_FILL_IN = (
    "name",
    "epochs",
    "data.name",
    "data.root",
    "data.batch_size",
    "model.name",
    "optimizer.name",
    "optimizer.lr",
)
"""The settings that differ from task to task."""

_WIDTH = 100
_HEAD = """\
# The settings of a run, as `python -m worm_dist init --preset {preset}` prints them.
#
# Fill in what is marked with "fill in"; as it is, it trains on the digits, which ship with
# scikit-learn.  All other settings are commented out and show the value that they have: remove the
# `#` to change one.  Comments have a blank after the `#`.
#
#   python -m worm_dist train FILE --check      are the settings valid?
#   python -m worm_dist plan FILE               what would a run drop, compute and send?
#   torchrun --standalone --nproc-per-node 2 -m worm_dist train FILE
#
# Intervals are in epochs (1ep) or in optimizer steps, also called batches (200ba).
"""


def settings_template(preset: str) -> str:
    """A commented YAML file with every setting, which is valid as it is.

    Settings to fill in and the preset are active; the others are commented out, so that another
    preset still decides them.  A line without a blank after ``#`` is a setting.

    Args:
        preset: the preset whose values are shown.

    Raises:
        ConfigError: there is no such preset.
    """
    config = RunConfig(preset=preset)
    parts = [name for name, value in config if isinstance(value, Settings)]
    parts.sort(key=lambda name: name in WormParts.model_fields)  # the engine's after the run's
    lines = list(_lines(config, ""))
    for name in parts:
        part: Settings = getattr(config, name)
        lines += ["", "", f"# ---- {name} ----", *_comment(_text(type(part).__doc__ or ""))]
        lines += _lines(part, f"{name}.")
    return _HEAD.format(preset=preset) + "\n".join(lines) + "\n"


def _lines(part: Settings, prefix: str) -> Iterator[str]:
    """The settings of a part, each below its description; parts of the whole run are left out."""
    fields, values = type(part).model_fields, part.model_dump(mode="json")
    for name, field in fields.items():
        key, below = f"{prefix}{name}", getattr(part, name)
        if isinstance(below, Settings):
            if prefix:
                yield from ("", *_comment(f"{key}: {_text(type(below).__doc__ or '')}"))
                yield from _lines(below, f"{key}.")
            continue
        description = _text(field.description or "")
        choices = _choices(field.annotation)
        if choices:
            description += f" One of: {', '.join(choices)}."
        yield from ("", *_comment(description.strip()))
        setting = f"{key}: {_yaml(values[name])}"
        if key in TO_FILL_IN:
            yield f"{setting}  # <- fill in"
        else:
            yield setting if key == "preset" else f"#{setting}"


def _text(docstring: str) -> str:
    """The first paragraph of a docstring, as plain text on one line."""
    return " ".join(docstring.split("\n\n")[0].split()).replace("``", "`")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def _choices(annotation: Any) -> list[str]:
    """The words that a setting may be; none where it may be something else."""
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


def _yaml(value: Any) -> str:
    """The value on one line; words without quotes where they are read as words."""
    is_word = isinstance(value, str) and parse_yaml(value, "") == value
    return value if is_word else json.dumps(value)
