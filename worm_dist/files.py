"""Files: atomic writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_json"]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: the file to write or replace.
        content: the JSON value.

    Raises:
        ValueError: the content has a NaN or an infinity, which JSON does not support.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
