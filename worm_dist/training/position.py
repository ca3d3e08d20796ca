"""Position of a training run: the next epoch and batch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Position"]


@dataclass
class Position:
    """Position between two optimizer steps.

    Attributes:
        epoch: the current epoch, counted from 0.
        batch: the next batch, counted from 0; after the last batch the epoch's test follows.
        draws: True while a draw, with the tests before and after it, is not finished.
        has_learnt: True if any test so far was better than chance.
        at_chance: True if the newest test was no better than chance.
    """

    epoch: int = 0
    batch: int = 0
    draws: bool = False
    has_learnt: bool = False
    at_chance: bool = False
