"""Elements that survive a cut move from any layout to any other, to the bit, in bounded pieces."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import Ranks
from worm_dist.bench.memory import peak_bytes
from worm_dist.distributed import byte_streams
from worm_dist.distributed.collectives import ProcessGroupComm
from worm_dist.pruning.optimizer_transfer import select
from worm_dist.pruning.resharding import Move, Part, Survivors, buffer_for, reshard

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex128)


def _cut(chance: random.Random) -> tuple[list[int], dict[int, Tensor]]:
    """A shape, and which indices of some of its dimensions are kept; perhaps none."""
    shape = [chance.randint(1, 5) for _ in range(chance.randint(0, 4))]
    kept = {
        dim: torch.tensor(sorted(chance.sample(range(size), chance.randint(0, size))))
        for dim, size in enumerate(shape)
        if chance.random() < 0.5
    }
    return shape, {dim: indices.long() for dim, indices in kept.items()}


@pytest.mark.parametrize("seed", range(40))
def test_survivors_are_those_of_a_selection(seed: int) -> None:
    shape, kept = _cut(random.Random(seed))
    flat = torch.arange(torch.Size(shape).numel())
    left = select(flat.view(shape), kept).flatten()
    survivors = Survivors(shape, kept)
    assert survivors.count == left.numel() and survivors.is_cut == bool(kept)
    assert [survivors.before(n) for n in range(len(flat) + 1)] == [
        int((left < n).sum()) for n in range(len(flat) + 1)
    ]
    for begin, end in itertools.combinations(range(survivors.count + 1), 2):
        assert torch.equal(survivors.indices(begin, end, CPU), left[begin:end])


def _bytes(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Elements of any bits: with -0, infinities and NaN of many kinds."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    high = 2 if dtype == torch.bool else 256
    memory = torch.randint(high, (count * dtype.itemsize,), generator=generator)
    return memory.to(torch.uint8).view(dtype).view(list(shape))


def _layout(count: int, chance: random.Random) -> list[list[tuple[int, int]]]:
    """The ranges of elements that each rank has: some have none, some have two."""
    owners = [[] for _ in range(dist.get_world_size())]  # type: list[list[tuple[int, int]]]
    ends = sorted(chance.choices(range(count + 1), k=3))
    for begin, end in itertools.pairwise([0, *ends, count]):
        chance.choice(owners).append((begin, end))
    return owners


def _parts(flat: Tensor, ranges: Sequence[tuple[int, int]]) -> list[Part]:
    return [Part(begin, flat[begin:end].clone()) for begin, end in ranges]


def _moved(piece_bytes: int) -> list[str]:
    byte_streams.PIECE_BYTES = piece_bytes
    assert dist.group.WORLD is not None
    chance, rank = random.Random(piece_bytes), dist.get_rank()
    comm = ProcessGroupComm(dist.group.WORLD, CPU)
    moves, expected = [], []
    for number in range(30):
        shape, kept = _cut(chance)
        full = _bytes(shape, DTYPES[number % len(DTYPES)], number)
        left = select(full, kept).flatten()
        old, new = (_layout(flat.numel(), chance)[rank] for flat in (full.flatten(), left))
        targets = [Part(begin, torch.zeros_like(left[begin:end])) for begin, end in new]
        sources = _parts(full.flatten(), old)
        moves.append(Move(Survivors(shape, kept), full.dtype, sources, targets))
        expected.append(_parts(left, new))
    buffer = buffer_for(moves, CPU)
    assert buffer.numel() <= piece_bytes
    reshard(moves, comm, buffer)
    return [
        f"{number}: {move.dtype}"
        for number, (move, parts) in enumerate(zip(moves, expected, strict=True))
        for found, part in zip(move.targets, parts, strict=True)
        if found.elements.view(torch.uint8).tolist() != part.elements.view(torch.uint8).tolist()
    ]


@pytest.mark.parametrize("piece_bytes", [16, 176, 1 << 20])
def test_elements_arrive_in_any_layout(ranks: Ranks, piece_bytes: int) -> None:
    assert ranks(3, _moved, piece_bytes) == [[]] * 3


def _moved_wrongly() -> str:
    """Rank one's old shard has no memory, so that it cannot be read."""
    byte_streams.PIECE_BYTES = 64
    assert dist.group.WORLD is not None
    rank, comm = dist.get_rank(), ProcessGroupComm(dist.group.WORLD, CPU)
    target = Part(0, torch.zeros(100, dtype=torch.int8))
    old = torch.ones(50, dtype=torch.int8, device="meta" if rank == 1 else "cpu")
    source = Part(50 * rank, old)
    moves = [Move(Survivors([100], {}), torch.int8, [source], [target])]
    try:
        reshard(moves, comm, buffer_for(moves, CPU))
    except Exception as error:
        return type(error).__name__
    return str(int(target.elements.sum()))


def test_a_rank_that_fails_lets_no_other_wait(ranks: Ranks) -> None:
    moved, failed = ranks(2, _moved_wrongly)
    assert moved == "50" and failed.endswith("Error")


def _memory_of_a_move() -> tuple[int, int, int]:
    """Bytes of the buffer; the largest allocation of a move of 40,000 bytes beside it; and those of
    the move of a tensor that is not cut."""
    byte_streams.PIECE_BYTES = 1008
    assert dist.group.WORLD is not None
    rank, comm = dist.get_rank(), ProcessGroupComm(dist.group.WORLD, CPU)
    largest = []
    even = torch.arange(0, 100, 2)
    for kept in ({0: even, 1: even}, {}):
        survivors = Survivors([100, 100], kept)
        source = Part(5000 * rank, torch.ones(5000))
        target = Part(0, torch.empty(survivors.count))
        moves = [Move(survivors, torch.float32, [source], [target])]
        buffer = buffer_for(moves, CPU)
        reshard(moves, comm, buffer)  # the first collectives of a group allocate buffers
        largest.append(peak_bytes(partial(reshard, moves, comm, buffer))[1])
    return buffer.numel(), largest[0], largest[1]


def test_a_move_takes_a_piece_and_the_indices_of_its_elements(ranks: Ranks) -> None:
    """A draw made a row of all parameters on every rank, and an integer copy of it."""
    for piece, indices, nothing in ranks(2, _memory_of_a_move):
        assert (piece, nothing) == (1008, 0)
        assert 0 < indices <= 8 * 1008 // 4
