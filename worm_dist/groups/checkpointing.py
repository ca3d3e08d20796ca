"""Activation checkpointing: switched off while a network is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointFunction

__all__ = ["checkpointing_off"]


@contextmanager
def checkpointing_off() -> Iterator[None]:
    """Make ``torch.utils.checkpoint`` call the given function directly within the context.

    Reentrant checkpointing would hide a block behind a single node of the autograd graph.
    """

    def run_directly(run: Callable[..., Any], preserves_rng: bool, *args: Any) -> Any:
        return run(*args)

    original = vars(CheckpointFunction).get("apply")
    CheckpointFunction.apply = run_directly
    try:
        yield
    finally:
        if original is None:
            del CheckpointFunction.apply  # falls back to the inherited one
        else:
            CheckpointFunction.apply = original
