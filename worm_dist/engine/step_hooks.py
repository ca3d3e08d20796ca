"""Step hooks: count optimizer steps, and call everything that acts around one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..backends.optimizer_view import Handle, OptimizerView, Owners, StepListener

__all__ = ["StepHooks"]


class StepHooks:
    """Counts the steps of an optimizer and calls listeners around each.

    Args:
        view: the view of the optimizer.

    Attributes:
        step: optimizer steps so far.
        listeners: what acts around a step.
    """

    def __init__(self, view: OptimizerView) -> None:
        self.step = 0
        self.listeners: Sequence[StepListener] = ()
        self._before: list[Callable[[], None]] = []
        self._holding: list[Callable[[int, Owners], None]] = []
        self._after: list[Callable[[int], None]] = []
        self._is_suspended = False
        self._handles: list[Handle] = []
        self.register(view)

    def listen(self, listeners: Sequence[StepListener]) -> None:
        """Call these around every step, in this order, and no others."""
        self.listeners, base = listeners, StepListener
        self._before = [x.before_step for x in listeners if _has(x, base.before_step)]
        self._holding = [x.hold for x in listeners if _has(x, base.hold)]
        self._after = [x.after_step for x in listeners if _has(x, base.after_step)]

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
            for before_step in self._before:
                before_step()

    def _hold(self, owners: Owners) -> None:
        if not self._is_suspended:
            for hold in self._holding:
                hold(self.step + 1, owners)

    def _after_step(self) -> None:
        if not self._is_suspended:
            self.step += 1
            for after_step in self._after:
                after_step(self.step)


def _has(listener: StepListener, method: Callable[..., None]) -> bool:
    """Whether the listener has its own implementation of a method that does nothing by default."""
    return getattr(type(listener), method.__name__) is not method
