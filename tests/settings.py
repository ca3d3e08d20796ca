"""Settings that several tests use."""

from __future__ import annotations

from typing import Any

__all__ = ["at_once"]


def at_once(num_steps: int) -> dict[str, Any]:
    """Of ``truncation``: all dropped channels begin to leave at once, and are zero after so many
    steps; then what each of them does can be written down."""
    return {"removal": {"duration": f"{num_steps}ba", "fade_steps": num_steps}}
