"""Step hooks: count optimizer steps, and call everything that acts around one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..backends.optimizer_view import Handle, OptimizerView, Owners, StepListener

__all__ = ["StepHooks"]


class StepHooks:
    """Counts the steps of an optimizer and calls listeners around each.

    Args:
        view: the view of the optimizer.

    Attributes:
        step: optimizer steps so far.
        listeners: what acts around a step, called in this order.
    """

    def __init__(self, view: OptimizerView) -> None:
        self.step = 0
        self.listeners: Sequence[StepListener] = ()
        self._is_suspended = False
        self._handles: list[Handle] = []
        self.register(view)

    def register(self, view: OptimizerView) -> None:
        """Register the hooks on another optimizer, instead of the one before."""
        self.remove()
        self._handles = view.register_hooks(self._before_step, self._hold, self._after_step)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context in which optimizer steps are ignored: DeepSpeed's initialisation takes one."""
        self._is_suspended = True
        try:
            yield
        finally:
            self._is_suspended = False

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self) -> None:
        if not self._is_suspended:
            for listener in self.listeners:
                listener.before_step()

    def _hold(self, owners: Owners) -> None:
        if not self._is_suspended:
            for listener in self.listeners:
                listener.hold(self.step + 1, owners)

    def _after_step(self) -> None:
        if not self._is_suspended:
            self.step += 1
            for listener in self.listeners:
                listener.after_step(self.step)
