"""Files: writing that is seen whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_json"]


def write_json(path: Path, content: Any) -> None:
    """Write one JSON object; a reader sees the old file or the new one, never a part.

    Raises:
        ValueError: the content holds a NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
