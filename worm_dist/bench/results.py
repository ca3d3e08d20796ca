"""Panel: what one benchmark found, ready for a table, a file or a picture."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .variants import Variant

__all__ = ["Panel", "Row", "Spread", "rows"]


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times: median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: of the contender.
        value: in the panel's unit.
        ratio: to the first contender in the same round.
        sent_share: of the gradients' bytes, handed to collectives; None if not known.
        ideal: share of these bytes that cannot be avoided; None if not defined.
    """

    name: str
    value: Spread
    ratio: Spread
    sent_share: float | None
    ideal: float | None


@dataclass(frozen=True)
class Panel:
    """What one benchmark found.

    Attributes:
        key: of the benchmark and the network that it ran over.
        title: for people.
        unit: of the rows' values.
        rows: the contenders, the one that the others are compared with first.
        figures: further ones, each with its name.
        setting: what it ran on.
    """

    key: str
    title: str
    unit: str
    rows: tuple[Row, ...]
    setting: Mapping[str, str | int]
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The figures, for people."""
        return [
            f"{name}: {value:,.1f}" if isinstance(value, float) else f"{name}: {value:,}"
            for name, value in self.figures.items()
        ]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Panel:
        """The panel that ``as_json`` described.

        Raises:
            KeyError, TypeError: it is something else.
        """
        rows = tuple(
            Row(**{**row, "value": Spread(**row["value"]), "ratio": Spread(**row["ratio"])})
            for row in content["rows"]
        )
        return cls(**{**content, "rows": rows})


def rows(contenders: Sequence[Variant], values: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    """The rows of a panel from what ``alternate`` measured."""
    return tuple(
        Row(
            contender.name,
            Spread.of(mine),
            # Within a round: what slowed one contender down has slowed down its neighbours too.
            Spread.of([value / first for value, first in zip(mine, values[0], strict=True)]),
            contender.sent_share(),
            contender.ideal,
        )
        for contender, mine in zip(contenders, values, strict=True)
    )
