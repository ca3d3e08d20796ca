"""Position: how far a training has come."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Position"]


@dataclass
class Position:
    """Between two steps.

    Attributes:
        epoch: that is being trained, from 0 on.
        batch: that comes next, from 0 on; after the last one the test of the epoch comes.
        draws: before that, the ticket is to be drawn, or tested after it was.
        has_learnt: a test was better than chance.
        at_chance: the newest test was not.
    """

    epoch: int = 0
    batch: int = 0
    draws: bool = False
    has_learnt: bool = False
    at_chance: bool = False
