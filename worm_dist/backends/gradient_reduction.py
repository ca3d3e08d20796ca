"""Gradient reduction: the one owner of the reducer of a wrapped network."""

from __future__ import annotations

from ..comm_hooks.reducer import Reducer
from ..config import TruncationConfig
from .backend import Backend

__all__ = ["GradientReduction"]


class GradientReduction:
    """How the gradients of a wrapped network are reduced.

    As long as nothing is frozen or compressed the wrapper reduces by itself, if its backend allows
    that; a reducer of ours replaces it when it is first needed.

    Args:
        backend: the network's backend.
        config: the settings of truncation.

    Attributes:
        backend: the backend in force.
        reducer: the gradient reducer; None while the wrapper reduces by itself.
    """

    def __init__(self, backend: Backend, config: TruncationConfig) -> None:
        self._config = config
        self._has_ended = False
        self.reducer: Reducer | None = None
        self.follow(backend)

    @property
    def is_ours(self) -> bool:
        """Whether truncated gradients are left out by a reducer, and not by hooks on parameters."""
        return self.backend.averages and self._config.mode == "hard"

    def require_reducer(self) -> Reducer:
        """The reducer, made now if there is none yet."""
        if self.reducer is None:
            self.reducer = self.backend.make_reducer(self._config)
        return self.reducer

    def follow(self, backend: Backend) -> None:
        """Reduce for another wrapper, in which nothing is frozen yet."""
        if self.reducer is not None:
            self.reducer.remove()
        self.backend, self.reducer = backend, None
        if self.is_ours and not self._has_ended and backend.reduces_at_once(self._config):
            self.require_reducer()

    def revive(self, backend: Backend) -> None:
        """Go on with the same reducer in a wrapper that has its hooks."""
        self.backend = backend

    def remove(self) -> None:
        """Reduce everything from now on, also in later wrappers."""
        self._has_ended = True
        if self.reducer is not None:
            self.reducer.remove()
