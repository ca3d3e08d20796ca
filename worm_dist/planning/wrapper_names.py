"""Names of what a network can be wrapped in, for the command line."""

from __future__ import annotations

__all__ = ["WRAPPERS"]

WRAPPERS = ("ddp", "fsdp", "zero-0", "zero-1", "zero-2", "zero-3")
