"""Verdict: what a check decided, the same on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Phase", "Verdict"]


class Phase(str, Enum):
    """Where a run is: search -> truncate -> ticket; dense if nothing is searched."""

    DENSE = "dense"
    SEARCH = "search"
    TRUNCATE = "truncate"
    TICKET = "ticket"

    def __str__(self) -> str:
        return self.value


_PHASES = tuple(Phase)


@dataclass(frozen=True)
class Verdict:
    """What follows from a check.

    Attributes:
        phase: from now on.
        stage: channels have left, and may be removed while others go on leaving: call
            ``engine.draw()``.
        ticket: the ticket may be drawn: call ``engine.draw()``.
        new_mask: a mask was cut at this very check.
        elbow: truncation starts at this very check.
        settled: every distance in a full window is below the threshold.
        distance_mean, distance_max: of the newest mask to the older ones in the window, 0 to 1;
            None before the second mask.
        generation: number of sets of slices that have been left out of the all-reduce.
        live_fraction: elements whose gradients are still averaged, of all that train in the dense
            network.
        left_fraction: dropped channels that have left, of all that the mask drops.
        paused: no further channel leaves for now, because the loss has risen.
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
    left_fraction: float = 0.0
    paused: bool = False

    SIZE: ClassVar[int] = 6
    """Numbers in ``encode``."""

    def encode(self) -> Tensor:
        """float64 ``[SIZE]`` of what rank zero decides; the rest follows on each rank."""
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
        phase, ticket, elbow, settled, mean, largest = numbers.tolist()
        return cls(
            phase=_PHASES[int(phase)],
            ticket=bool(ticket),
            elbow=bool(elbow),
            settled=bool(settled),
            distance_mean=None if math.isnan(mean) else mean,
            distance_max=None if math.isnan(largest) else largest,
        )
