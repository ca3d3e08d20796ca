"""Recovery: how long a drawn ticket takes to reach a stated accuracy again."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["recovery"]


def recovery(
    wanted: float, ticket_epoch: float, after_draw: float, tests: Iterable[tuple[float, float]]
) -> float | None:
    """Return the epochs from the draw until an accuracy is reached; 0 if the draw does not fall
    below it, None if it is not reached in any test.

    Args:
        wanted: the accuracy, 0 to 1.
        ticket_epoch: epochs trained before the draw.
        after_draw: the accuracy right after it.
        tests: the epochs trained before each test, and its accuracy, in order.
    """
    if after_draw >= wanted:
        return 0.0
    reached = (e - ticket_epoch for e, accuracy in tests if e > ticket_epoch and accuracy >= wanted)
    return next(reached, None)
