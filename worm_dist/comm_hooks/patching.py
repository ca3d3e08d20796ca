"""Patching: replace a function of another library until the patch is removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Patch"]


class Patch:
    """Replaces an object's function until ``remove``.

    Args:
        target: the object or module.
        name: the function's name.
        replacement: the function to call instead.

    Attributes:
        original: the function before the patch.
    """

    def __init__(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.original: Callable[..., Any] = getattr(target, name)
        self._target = target
        self._name = name
        self._previous = vars(target).get(name)
        self._replacement: Callable[..., Any] | None = replacement
        setattr(target, name, self)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        function = self.original if self._replacement is None else self._replacement
        return function(*arguments, **keywords)

    def remove(self) -> None:
        """Restore the function; below a later patch, once that one is removed too."""
        self._replacement = None
        attributes = vars(self._target)
        top = attributes.get(self._name)
        while isinstance(top, Patch) and top._replacement is None:
            top = top._previous
        if top is not None:
            setattr(self._target, self._name, top)
        elif self._name in attributes:
            delattr(self._target, self._name)  # the original is an attribute of its class
