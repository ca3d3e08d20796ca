"""Errors: the exception classes, one exit code each.

A message says what is wrong, where (key, layer, rank, step) and what to do about it.  The command
line prints it without a traceback and exits with the class's code, the same on every rank.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "CollapseError",
    "ConfigError",
    "DivergenceError",
    "DrawError",
    "NonFiniteError",
    "WormError",
]


class WormError(Exception):
    """Base class of all errors of worm_dist; the process exits with ``exit_code``."""

    exit_code = 1


class ConfigError(WormError, ValueError):
    """A value the user gave cannot be used: a setting, a mask, a model, a data folder."""

    exit_code = 2


class CheckpointError(WormError, ValueError):
    """A file or state written earlier is missing, damaged or of another run."""

    exit_code = 3


class DivergenceError(WormError, RuntimeError):
    """Ranks that must hold the same bits do not; the message names the ranks and the group."""

    exit_code = 4


class NonFiniteError(WormError, ArithmeticError):
    """A loss, a gradient or a score is NaN or infinite."""

    exit_code = 5


class BackendError(WormError, RuntimeError):
    """The processes cannot work together: launcher, process group, wrapper, device."""

    exit_code = 6


class CollapseError(WormError, RuntimeError):
    """The network's output does not depend on its input, or is no better than a constant."""

    exit_code = 7


class DrawError(WormError, RuntimeError):
    """Channels cannot be removed; network, optimizer and statistics are unchanged."""

    exit_code = 8
