"""Override: a function of somebody else's, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Override"]


class Override:
    """Puts a function in the place of an object's own, until ``remove``.

    Args:
        target: an object or a module.
        name: of the function.
        replacement: is called in its stead.

    Attributes:
        original: what was there.
    """

    def __init__(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.original: Callable[..., Any] = getattr(target, name)
        self._target = target
        self._name = name
        self._own = vars(target).get(name)
        self._replacement: Callable[..., Any] | None = replacement

        def placed(*arguments: Any, **keywords: Any) -> Any:
            function = self.original if self._replacement is None else self._replacement
            return function(*arguments, **keywords)

        self._placed = placed
        setattr(target, name, self._placed)

    def remove(self) -> None:
        """Put back what was there; if another one stands on top by now, let calls through."""
        self._replacement = None
        if vars(self._target).get(self._name) is not self._placed:
            return
        if self._own is None:
            delattr(self._target, self._name)  # its class has the original
        else:
            setattr(self._target, self._name, self._own)
