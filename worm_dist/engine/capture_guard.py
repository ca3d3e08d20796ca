"""Capture guard: refuses optimizer steps that are captured in a CUDA graph while channels are
frozen.

A graph repeats the step with which it was captured: a fade would stay at that step for ever, and
channels that freeze later would not be held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends.optimizer_view import StepListener
from ..errors import BackendError

__all__ = ["CaptureGuard"]


def _is_capturing() -> bool:
    # Asking CUDA where it is not in use would initialise it.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class CaptureGuard(StepListener):
    """Refuses captured steps.

    Args:
        is_frozen: whether any channel is frozen.
        is_capturing: whether a graph is being captured.
    """

    def __init__(
        self, is_frozen: Callable[[], bool], is_capturing: Callable[[], bool] = _is_capturing
    ) -> None:
        self._is_frozen = is_frozen
        self._is_capturing = is_capturing

    def before_step(self) -> None:
        """See ``StepListener``.

        Raises:
            BackendError: a graph is being captured, and channels are frozen.
        """
        if self._is_capturing() and self._is_frozen():
            raise BackendError(
                "optimizer.step: it is being captured in a CUDA graph while channels are frozen, "
                "and the graph would repeat this one step of their removal for ever; step outside "
                "of the graph until the ticket is drawn, then capture it"
            )
