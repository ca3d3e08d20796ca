"""Convergence: the history of checks and their mask distances.  Kept on rank zero only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from ..config import SearchConfig
from ..groups.mask import Mask
from ..schema import Count, Finite, Schema
from .decision import decide, mean
from .window import Window

__all__ = ["CheckRecord", "History", "HistorySchema"]


class _RecordSchema(Schema):
    step: Count
    distances: tuple[Finite, ...]
    threshold: Finite | None
    elbow: bool
    settled: bool
    floored: tuple[str, ...]


class HistorySchema(Schema):
    """Schema of ``History.state_dict``."""

    sizes: dict[str, int]
    masks: Tensor
    records: list[_RecordSchema]

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        shape = (len(self.records), sum(self.sizes.values()))
        if self.masks.dtype != torch.bool or self.masks.shape != shape:
            raise ValueError(
                f"masks are {self.masks.dtype} {list(self.masks.shape)}, not torch.bool "
                f"{list(shape)}, as many as records and sizes say"
            )
        if any(size < 1 for size in self.sizes.values()):
            raise ValueError("sizes are not positive")
        return self


@dataclass(frozen=True)
class CheckRecord:
    """The result of one check.

    Attributes:
        step: the number of optimizer steps before the check.
        mask: the mask over the candidates at this check.
        distances: the distances of the mask to the older ones in the window, oldest first, 0 to 1.
        threshold: the mean distance below which the elbow rule fires; None for rules without one.
        elbow: whether truncation may start.
        settled: whether the mask has settled, so that the ticket may be drawn.
        floored: the names of groups in which the floor kept a channel.
    """

    step: int
    mask: Mask
    distances: tuple[float, ...]
    threshold: float | None
    elbow: bool
    settled: bool
    floored: tuple[str, ...]

    @property
    def distance_mean(self) -> float | None:
        return mean(self.distances)

    @property
    def distance_max(self) -> float | None:
        return max(self.distances, default=None)


class History:
    """The records of all checks and the window over the newest masks."""

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._window = Window(config.window)
        self._records: list[CheckRecord] = []

    def record(self, step: int, mask: Mask, floored: tuple[str, ...]) -> CheckRecord:
        """Add a check and evaluate the elbow and settled rules; settled implies elbow."""
        self._window.push(mask)
        distances = self._window.distances
        decision = decide(self._config, [*(r.distances for r in self._records), distances])
        record = CheckRecord(
            step=step,
            mask=mask,
            distances=distances,
            threshold=decision.threshold,
            elbow=decision.elbow,
            settled=decision.settled,
            floored=floored,
        )
        self._records.append(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the masks as bool ``[checks, candidates]`` and the records as plain values."""
        masks = [record.mask for record in self._records]
        return {
            "sizes": masks[0].sizes if masks else {},
            "masks": torch.stack([m.keep for m in masks]) if masks else torch.empty(0, 0).bool(),
            "records": [
                {key: getattr(record, key) for key in _RecordSchema.model_fields}
                for record in self._records
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the records; the window is rebuilt from the newest masks."""
        masks = [Mask.from_vector(state["sizes"], keep) for keep in state["masks"]]
        self._records = [
            CheckRecord(mask=mask, **record)
            for mask, record in zip(masks, state["records"], strict=True)
        ]
        self._window = Window(self._config.window, masks)

    @property
    def records(self) -> tuple[CheckRecord, ...]:
        return tuple(self._records)
