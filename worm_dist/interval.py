"""Interval: a length of training, in epochs ("1ep", "0.25ep"), in optimizer steps ("200ba") or as a
share of the whole training ("0.1dur")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

__all__ = ["Interval"]

_SHORTEST, _LONGEST = 1e-6, 1e9


@dataclass(frozen=True)
class Interval:
    """A positive length of training.

    Attributes:
        count: number of units; whole if the unit is ``"ba"``.
        unit: ``"ep"`` for epochs, ``"ba"`` for batches, that is optimizer steps, ``"dur"`` for the
            duration of the whole training.

    Raises:
        ValueError: the count is not from a millionth to a billion, is a fraction of a batch, or
            more than the whole training.
    """

    count: float
    unit: Literal["ep", "ba", "dur"]

    def __post_init__(self) -> None:
        if not _SHORTEST <= self.count <= _LONGEST:
            raise ValueError(
                "an interval must be positive, at least 0.000001 and at most 1000000000, got "
                f"{self}"
            )
        if self.unit == "ba" and self.count != int(self.count):
            raise ValueError(f"an interval in batches must be whole, got {self}")
        if self.unit == "dur" and self.count > 1:
            raise ValueError(f"1dur is the whole training; got {self}")

    @classmethod
    def parse(cls, text: object) -> Interval:
        """Read ``"1ep"``, ``"0.25ep"``, ``"200ba"`` or ``"0.1dur"``.

        Raises:
            ValueError: the text is not a number followed by ``ep``, ``ba`` or ``dur``.
        """
        if isinstance(text, cls):
            return text
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|ba|dur)", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                'write epochs as "1ep", steps as "200ba" or a share of the training as "0.1dur", '
                f"got {text!r}"
            )
        return cls(float(match[1]), cast(Literal["ep", "ba", "dur"], match[2]))

    def steps(self, steps_per_epoch: int | None, total_steps: int | None) -> int:
        """The interval in optimizer steps, at least one.

        Args:
            steps_per_epoch: optimizer steps in an epoch; None if not known.
            total_steps: optimizer steps of the whole training; None if not known.

        Raises:
            ValueError: the length of the unit is not known; says which one.
        """
        lengths = {"ep": steps_per_epoch, "ba": 1, "dur": total_steps}
        length = lengths[self.unit]
        if length is None:
            what = "an epoch" if self.unit == "ep" else "the whole training"
            raise ValueError(f"the number of steps in {self} is not known: that of {what} is not")
        return max(1, round(self.count * length))

    def __str__(self) -> str:
        """As ``parse`` reads it, to the last digit and without an exponent."""
        return f"{Decimal(repr(self.count)):f}".removesuffix(".0") + self.unit
