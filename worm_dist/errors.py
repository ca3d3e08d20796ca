"""The error tree: one branch and one exit code for each kind of trouble.

A message says what is wrong, where (key, layer, rank, step) and what to do about it.  The command
line prints it without a traceback and exits with the branch's code, the same on every rank.
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
    """Whatever worm_dist refuses to do; ``exit_code`` is what the process exits with."""

    exit_code = 1


class ConfigError(WormError, ValueError):
    """A value the user gave cannot be used: a setting, a mask, a model, a data folder."""

    exit_code = 2


class CheckpointError(WormError, ValueError):
    """A file written earlier is missing, damaged or does not belong here."""

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
    """The network no longer answers, or answers no better than a constant would."""

    exit_code = 7


class DrawError(WormError, RuntimeError):
    """Channels cannot be removed; network, optimizer and statistics are as they were."""

    exit_code = 8
