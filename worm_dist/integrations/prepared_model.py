"""Prepared model: Accelerate's own references to the wrapped network, which a draw replaces."""

from __future__ import annotations

from typing import Any

from ..engine.engine import Engine

__all__ = ["PreparedModel"]


class PreparedModel:
    """Keeps an ``Accelerator`` at the engine's present model, for its checkpoints and clipping.

    Args:
        accelerator: the ``accelerate.Accelerator`` that has prepared the model.
        engine: the engine that is attached to it.
    """

    def __init__(self, accelerator: Any, engine: Engine) -> None:
        self._accelerator = accelerator
        self._engine = engine
        self._model = engine.model

    def follow(self) -> None:
        """Replace the model from before a draw by the present one."""
        old, new = self._model, self._engine.model
        if new is old:
            return
        models = self._accelerator._models
        models[:] = [new if model is old else model for model in models]
        new._is_accelerate_prepared = True  # type: ignore[assignment]
        self._model = new
