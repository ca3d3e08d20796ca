"""Ignored steps: optimizer steps that are not those of the training.

To read or write an optimizer's state that is still empty, torch's functions for sharded states take
a step with gradients of zero and a learning rate of zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..engine.attachment import context_of
from ..engine.engine import Engine

__all__ = ["ignoring_steps"]


def ignoring_steps(engine: Engine, function: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's function that reads or writes the state of a sharded optimizer, whose steps
    within it the engine does not see."""

    @functools.wraps(function)
    def ignoring(*arguments: Any, **keywords: Any) -> Any:
        with context_of(engine).steps_ignored():
            return function(*arguments, **keywords)

    return ignoring
