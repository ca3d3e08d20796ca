"""Stage: a part of a run in which every step computes and sends the same."""

from __future__ import annotations

from typing import Literal

__all__ = ["Stage"]

Stage = Literal["dense", "truncated", "faded", "ticket"]
"""``dense``: nothing is frozen.  ``truncated``: gradients of dropped channels are left out.
``faded``: so are those of the columns that read them, and weights that a pass gathers.  ``ticket``:
dropped channels are removed."""
