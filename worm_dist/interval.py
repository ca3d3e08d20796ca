"""Interval: a stretch of training, in epochs ("1ep", "0.25ep") or in optimizer steps ("200ba")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Interval"]


@dataclass(frozen=True)
class Interval:
    """A positive stretch of training.

    Attributes:
        count: how many units; whole if the unit is ``"ba"``.
        unit: ``"ep"`` for epochs, ``"ba"`` for batches, that is optimizer steps.

    Raises:
        ValueError: the count is not positive, or is a fraction of a batch.
    """

    count: float
    unit: Literal["ep", "ba"]

    def __post_init__(self) -> None:
        if self.count <= 0:
            raise ValueError(f"an interval must be positive, got {self}")
        if self.unit == "ba" and self.count != int(self.count):
            raise ValueError(f"an interval in batches must be whole, got {self}")

    @classmethod
    def parse(cls, text: object) -> Interval:
        """Read ``"1ep"``, ``"0.25ep"`` or ``"200ba"``.

        Raises:
            ValueError: the text is not a number followed by ``ep`` or ``ba``.
        """
        if isinstance(text, cls):
            return text
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|ba)", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'write epochs as "1ep" or steps as "200ba", got {text!r}')
        return cls(float(match[1]), "ep" if match[2] == "ep" else "ba")

    def steps(self, steps_per_epoch: int) -> int:
        """The interval in optimizer steps, at least one."""
        steps = self.count * steps_per_epoch if self.unit == "ep" else self.count
        return max(1, round(steps))

    def __str__(self) -> str:
        return f"{self.count:g}{self.unit}"
