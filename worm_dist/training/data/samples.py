"""Samples: what the splits of a data set are made of."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Samples"]


class Samples(Protocol):
    """(image, class) pairs by index; torch's ``Dataset`` alone does not say how many there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...
