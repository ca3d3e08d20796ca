"""Interval: a length of training, in epochs ("1ep", "0.25ep") or in optimizer steps ("200ba")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

__all__ = ["Interval"]

_SHORTEST, _LONGEST = 1e-6, 1e9


@dataclass(frozen=True)
class Interval:
    """A positive length of training.

    Attributes:
        count: number of units; whole if the unit is ``"ba"``.
        unit: ``"ep"`` for epochs, ``"ba"`` for batches, that is optimizer steps.

    Raises:
        ValueError: the count is not from a millionth to a billion, or is a fraction of a batch.
    """

    count: float
    unit: Literal["ep", "ba"]

    def __post_init__(self) -> None:
        if not _SHORTEST <= self.count <= _LONGEST:
            raise ValueError(
                "an interval must be positive, at least 0.000001 and at most 1000000000, got "
                f"{self}"
            )
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
        """As ``parse`` reads it, to the last digit and without an exponent."""
        return f"{Decimal(repr(self.count)):f}".removesuffix(".0") + self.unit
