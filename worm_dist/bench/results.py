"""Results of a benchmark, for its table, file and plot."""

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
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    """Results of one variant.

    Attributes:
        name: name of the variant.
        value: the measured value, in the panel's unit.
        ratio: the value divided by that of the first variant in the same round.
        sent_share: bytes passed to collectives as a fraction of the gradients' bytes; None if
            unknown.
        ideal: smallest possible fraction; None if not defined.
        processor: processor time divided by that of the first variant in the same round, the time
            of all ranks and threads; None if it was not measured.
    """

    name: str
    value: Spread
    ratio: Spread
    sent_share: float | None
    ideal: float | None
    processor: Spread | None = None


@dataclass(frozen=True)
class Panel:
    """Results of one benchmark.

    Attributes:
        key: identifier of the benchmark and, for step times, the network.
        title: heading of the table and the plot.
        unit: unit of the rows' values.
        rows: the variants, with the baseline first.
        setting: description of the environment, by name.
        figures: additional figures, by name.
    """

    key: str
    title: str
    unit: str
    rows: tuple[Row, ...]
    setting: Mapping[str, str | int]
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The additional figures as lines of text."""
        return [
            f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {_number(value)}"
            for name, value in self.figures.items()
        ]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Panel:
        """Rebuild a panel from what ``as_json`` returned.

        Raises:
            KeyError, TypeError: the content has another format.
        """
        rows = tuple(
            Row(**{key: _from_json(value) for key, value in row.items()}) for row in content["rows"]
        )
        return cls(**{**content, "rows": rows})


def rows(
    variants: Sequence[Variant],
    values: Sequence[Sequence[float]],
    processor_seconds: Sequence[Sequence[float]] | None = None,
) -> tuple[Row, ...]:
    """Build the rows of a panel.

    Args:
        variants: the variants, with the baseline first.
        values: measured values of each variant, one per round.
        processor_seconds: processor time of each variant, one per round.
    """
    processor: Sequence[Spread | None] = [None] * len(variants)
    if processor_seconds is not None:
        processor = [_ratio(own, processor_seconds[0]) for own in processor_seconds]
    return tuple(
        Row(
            variant.name,
            Spread.of(own_values),
            _ratio(own_values, values[0]),
            variant.sent_share(),
            variant.ideal,
            own_processor,
        )
        for variant, own_values, own_processor in zip(variants, values, processor, strict=True)
    )


def _ratio(values: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Ratios within a round, as a busy machine slows all variants of a round."""
    return Spread.of([value / first for value, first in zip(values, baseline, strict=True)])


def _from_json(value: Any) -> Any:
    return Spread(**value) if isinstance(value, Mapping) else value


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
