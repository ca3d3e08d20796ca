"""Findings: what one rank saw of a table's row, column by column."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Findings"]


@dataclass
class Findings:
    """Attributes:
    num_comparisons: for each column; one that was never looked at does not hold.
    wrong: for each column, what was not as it should be.
    masks: digests after every check.
    weights: digests after every step.
    """

    num_comparisons: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    masks: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)

    def expect(self, column: str, holds: bool, what: str) -> None:
        self.num_comparisons[column] += 1
        if not holds:
            self.wrong.setdefault(column, []).append(what)

    def same(
        self,
        column: str,
        actual: Tensor,
        expected: Tensor,
        what: str,
        tolerance: float = 0.0,
    ) -> None:
        """Bit-equal (NaN equals NaN), or of a small relative distance."""
        if tolerance and actual.is_floating_point() and actual.shape == expected.shape:
            distance = float((actual - expected).norm() / expected.norm().clamp(min=1e-12))
            self.expect(column, distance <= tolerance, f"{what}: {distance:.1e} off")
            return
        equal = torch.equal(actual, expected) or (
            actual.shape == expected.shape
            and torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True)
        )
        self.expect(column, equal, what)

    def all_same(
        self,
        column: str,
        actual: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        what: str,
        tolerance: float = 0.0,
    ) -> None:
        self.expect(column, actual.keys() == expected.keys(), f"{what}: other names")
        for name in actual.keys() & expected.keys():
            self.same(column, actual[name], expected[name], f"{what}: {name}", tolerance)

    @contextmanager
    def of(self, *columns: str) -> Iterator[None]:
        """An exception within speaks against all of these."""
        try:
            yield
        except Exception:
            for column in columns:
                self.expect(column, False, traceback.format_exc())
