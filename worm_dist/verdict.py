"""Verdict: the result of a check, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Phase", "Verdict"]


class Phase(str, Enum):
    """Phase of a run: search -> truncate -> ticket; dense without a search."""

    DENSE = "dense"
    SEARCH = "search"
    TRUNCATE = "truncate"
    TICKET = "ticket"

    def __str__(self) -> str:
        return self.value


_PHASES = tuple(Phase)


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        phase: the phase from now on.
        stage: whether a stage may be drawn, while other channels still fade: call
            ``engine.draw()``.
        ticket: whether the ticket may be drawn: call ``engine.draw()``.
        new_mask: whether a mask was computed at this check.
        elbow: whether truncation starts at this check.
        settled: whether every distance in a full window is below the threshold.
        distance_mean: mean distance of the newest mask to the older ones in the window, 0 to 1;
            None before the second mask.
        distance_max: the largest of these distances.
        generation: number of freeze plans so far.
        live_fraction: share of the dense network's trained elements whose gradients are still
            averaged, 0 to 1.
        removed_fraction: share of the mask's dropped channels that are zero or removed, 0 to 1.
        paused: whether the removal of further channels pauses, because the loss has risen.
    """

    phase: Phase
    stage: bool = False
    ticket: bool = False
    new_mask: bool = False
    elbow: bool = False
    settled: bool = False
    distance_mean: float | None = None
    distance_max: float | None = None
    generation: int = 0
    live_fraction: float = 1.0
    removed_fraction: float = 0.0
    paused: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields in plain values."""
        return {**asdict(self), "phase": str(self.phase)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Verdict:
        """The verdict from ``as_dict``."""
        return cls(**{**fields, "phase": Phase(fields["phase"])})

    SIZE: ClassVar[int] = 6
    """Number of elements of ``encode``."""

    def encode(self) -> Tensor:
        """float64 ``[SIZE]``: the fields that rank zero decides; each rank computes the others."""
        numbers = (
            _PHASES.index(self.phase),
            self.ticket,
            self.elbow,
            self.settled,
            math.nan if self.distance_mean is None else self.distance_mean,
            math.nan if self.distance_max is None else self.distance_max,
        )
        return torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def decode(cls, numbers: Tensor) -> Verdict:
        """The verdict from ``encode``, float64 ``[SIZE]``."""
        phase, ticket, elbow, settled, mean, largest = numbers.tolist()
        return cls(
            phase=_PHASES[int(phase)],
            ticket=bool(ticket),
            elbow=bool(elbow),
            settled=bool(settled),
            distance_mean=None if math.isnan(mean) else mean,
            distance_max=None if math.isnan(largest) else largest,
        )
