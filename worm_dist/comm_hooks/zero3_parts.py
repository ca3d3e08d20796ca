"""ZeRO-3 parts: how DeepSpeed cuts a flattened parameter or gradient into a part for each rank, and
how many live elements are in each part.

The live elements of a parameter keep their order, so each rank's are a section of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor

from ..groups.freeze_plan import Block
from .packing import Packing

__all__ = ["live_sections", "packing_of_parts", "part_of", "part_size"]


def part_size(num_elements: int, world_size: int) -> int:
    """Number of elements of every rank's part, with padding."""
    return -(-num_elements // world_size)


def part_of(num_elements: int, world_size: int, rank: int) -> tuple[int, int]:
    """The first element and the number of elements of a rank's part, without padding."""
    size = part_size(num_elements, world_size)
    begin = min(rank * size, num_elements)
    return begin, min(size, num_elements - begin)


def live_sections(block: Block | None, num_elements: int, world_size: int) -> list[int]:
    """Number of live elements in each rank's part.

    Args:
        block: the live and frozen slices; None if all elements are live.
        num_elements: number of all elements.
        world_size: number of ranks.
    """
    ends = [sum(part_of(num_elements, world_size, rank)) for rank in range(world_size)]
    upto = ends if block is None else [_num_live_before(block, end) for end in ends]
    return [end - begin for begin, end in zip([0, *upto], upto)]


def packing_of_parts(
    blocks: Sequence[Block | None], spans: Sequence[tuple[int, int]], like: Tensor
) -> Packing:
    """The packing of one rank's parts, one after another.

    Args:
        blocks: the live and frozen slices of each parameter; None if all of it is live.
        spans: the first element and the number of elements of each part.
        like: a tensor of the parts' dtype and device.
    """
    own = [
        None if block is None else block.part(*span)
        for block, span in zip(blocks, spans, strict=True)
    ]
    sizes = [num_elements for _, num_elements in spans]
    flat = like.new_empty(sum(sizes)).split(sizes)
    parts = [
        part if block is None else part.view(block.shape)
        for part, block in zip(flat, own, strict=True)
    ]
    return Packing(own, parts, like.new_empty(0))


def _num_live_before(block: Block, end: int) -> int:
    """How many of the first elements of a flattened parameter are live."""
    if end >= block.shape.numel():
        return block.num_live
    found, rest = 0, end
    for dim, (size, live_size) in enumerate(zip(_strides(block.shape), _strides(block.live_shape))):
        index, rest = divmod(rest, size)
        live = block.live.get(dim)
        found += (index if live is None else int((live < index).sum())) * live_size
        if live is not None and not bool((live == index).any()):
            break  # what is left of these elements is within a frozen slice
    return found


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Number of elements of one slice along each dimension."""
    return [*accumulate(reversed(shape[1:]), mul, initial=1)][::-1]
