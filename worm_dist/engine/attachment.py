"""Attachment: what other packages ask of an engine, and users need not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .context import TrainingContext
from .engine import Engine

__all__ = ["context_of", "dense_shapes_of", "is_attached"]


def context_of(engine: Engine) -> TrainingContext:
    """The network in its wrapper, its optimizer, and the hooks on both; the same object also after
    a draw and after ``Engine.detach``."""
    return engine._training


def is_attached(engine: Engine) -> bool:
    """Whether ``Engine.detach`` has not been called yet."""
    return engine._attached


def dense_shapes_of(engine: Engine) -> Mapping[str, torch.Size]:
    """The shapes of the dense network's parameters, by name."""
    return engine._dense.shapes
