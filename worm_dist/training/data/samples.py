"""Protocol of a data set's split."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Samples"]


class Samples(Protocol):
    """(image, class) pairs by index, with a length, which torch's ``Dataset`` does not declare."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...
