"""Override: a function of somebody else's, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Patch"]


class Patch:
    """Stands in the place of an object's function, until ``remove``.

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
        setattr(target, name, self)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        function = self.original if self._replacement is None else self._replacement
        return function(*arguments, **keywords)

    def remove(self) -> None:
        """Put back what was there; below another override, once that one has gone too."""
        self._replacement = None
        there = vars(self._target)
        top = there.get(self._name)
        while isinstance(top, Patch) and top._replacement is None:
            top = top._own
        if top is not None:
            setattr(self._target, self._name, top)
        elif self._name in there:
            delattr(self._target, self._name)  # its class has the original
