"""In stage 3 live elements are counted part by part without looking at each of them."""

from __future__ import annotations

import pytest
import torch

from worm_dist.comm_hooks.zero3_parts import live_sections, part_of
from worm_dist.groups.freeze_plan import Block

_SHAPES = ((7,), (5, 4), (4, 3, 3, 3), (3, 1, 2), (1,))


def _block(shape: tuple[int, ...], frozen: dict[int, list[int]]) -> Block:
    indices = {dim: torch.tensor(here, dtype=torch.int64) for dim, here in frozen.items()}
    live = {
        dim: torch.tensor([n for n in range(shape[dim]) if n not in here], dtype=torch.int64)
        for dim, here in frozen.items()
    }
    return Block(torch.Size(shape), live, indices)


def _blocks() -> list[Block]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in _SHAPES:
        for dims in ((0,), (1,), (0, 1)):
            if max(dims) < len(shape):
                frozen = {
                    dim: torch.rand(shape[dim], generator=generator).gt(0.5).nonzero().flatten()
                    for dim in dims
                }
                found.append(_block(shape, {dim: at.tolist() for dim, at in frozen.items()}))
        found.append(_block(shape, {0: list(range(shape[0]))}))  # nothing is live
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_sections_are_what_counting_one_by_one_finds(world_size: int) -> None:
    for block in _blocks():
        is_live = torch.ones(block.shape, dtype=torch.bool)
        for dim, frozen in block.frozen.items():
            is_live.index_fill_(dim, frozen, False)
        size = block.shape.numel()
        parts = [part_of(size, world_size, rank) for rank in range(world_size)]
        flat = is_live.flatten()
        expected = [int(flat[begin : begin + length].sum()) for begin, length in parts]
        assert live_sections(block, size, world_size) == expected
        assert live_sections(None, size, world_size) == [length for _, length in parts]
        assert sum(length for _, length in parts) == size
