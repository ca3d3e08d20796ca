"""Layout: where DeepSpeed puts the parameters of a group that it partitions."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["layout"]


def layout(
    sizes: Sequence[int], num_ranks: int, in_turns: bool = False, unit: int = 1
) -> tuple[list[int], int]:
    """Parameters lie in a row, as long as a multiple of twice the ranks; it is cut into a partition
    for each rank.

    Args:
        sizes: elements of each parameter, in the order of the group.
        num_ranks: among which the row is divided.
        in_turns: the parameters are dealt out to the ranks first (``round_robin_gradients``).
        unit: every parameter begins at a multiple of this many elements (``parameter_alignment``).

    Returns:
        The place of every parameter in the row, and the length of the row.
    """
    order = list(range(len(sizes)))
    if in_turns:
        order = [number for first in range(num_ranks) for number in order[first::num_ranks]]
    places, end = [0] * len(sizes), 0
    for number in order:
        places[number] = end + -end % unit
        end = places[number] + sizes[number]
    return places, end + -end % (2 * num_ranks)
