"""A sharded state comes to rank zero to the bit, and other ranks need no more than a piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.dist.partitions import PartitionView, full_row, partition
from tests.ranks import Ranks
from worm_dist.backends.full_state import FullParamState, bits_of, gather, scatter_full_state
from worm_dist.bench.memory import peak_bytes
from worm_dist.distributed import byte_streams
from worm_dist.distributed.collectives import ProcessGroupComm

SHAPES = ((40, 25), (7,), (3, 5, 2, 2), ())
MOMENTS = ("exp_avg", "exp_avg_sq")


def _view(dtype: torch.dtype) -> tuple[PartitionView, list[nn.Parameter], dict[str, Tensor]]:
    """A view after a step; and the row of the masters and of each moment, any bits."""
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    rows = {key: full_row(parameters, seed) for seed, key in enumerate(("value", *MOMENTS))}
    own = nn.Parameter(partition(rows["value"]))
    view = PartitionView(parameters, own)
    view.optimizer.state[own] = {
        "step": torch.tensor(3.0),
        **{key: partition(rows[key]) for key in MOMENTS},
    }
    return view, parameters, rows


def _of(row: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    sizes = [p.numel() for p in parameters]
    parts = row[: sum(sizes)].split(sizes)
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits_of(one), bits_of(other))


def _gathered(dtype: torch.dtype, piece_bytes: int, masters_differ: bool) -> Any:
    """The largest allocation, and what is wrong."""
    byte_streams.PIECE_BYTES = piece_bytes
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, torch.device("cpu"))
    view, parameters, rows = _view(dtype)
    if not masters_differ:
        for parameter, value in zip(parameters, _of(rows["value"], parameters), strict=True):
            parameter.data = value.clone()
    gather(view, comm)  # the first collectives of a group allocate buffers of their own
    found: list[dict[Tensor, FullParamState] | None] = []
    _, largest = peak_bytes(lambda: found.append(gather(view, comm)))
    if found[0] is None:
        return largest, comm.rank, []
    wrong = []
    for key, row in rows.items():
        for parameter, part in zip(parameters, _of(row, parameters), strict=True):
            state = found[0][parameter]
            here = state.value if key == "value" else state.moments[key]
            if key == "value" and not masters_differ:
                wrong += [] if here is None else [key]
            elif not isinstance(here, Tensor) or not _same(here, part):
                wrong.append(key)
            wrong += [] if state.per_param == {"step": 3.0} else ["step"]
    return largest, comm.rank, wrong


@pytest.mark.parametrize(
    ("dtype", "masters_differ"),  # masters of another dtype always differ
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize(("size", "piece_bytes"), [(3, 900), (2, 1 << 20)])
def test_a_sharded_state_is_gathered_on_rank_zero_alone(
    ranks: Ranks, size: int, piece_bytes: int, dtype: torch.dtype, masters_differ: bool
) -> None:
    (_, _, wrong), *others = ranks(size, _gathered, dtype, piece_bytes, masters_differ)
    assert not wrong
    count = sum(torch.Size(shape).numel() for shape in SHAPES)  # divisible by 2 and by 3
    stream = 4 * (2 + masters_differ) * count // size
    # It made a row of all parameters on every rank, whatever the number of ranks.
    assert [largest for largest, _, _ in others] == [min(stream, piece_bytes // size)] * len(others)


def _scattered() -> list[str]:
    """What a new optimizer lacks of a full state that is written into it."""
    view, parameters, rows = _view(torch.bfloat16)
    fresh = PartitionView(parameters, nn.Parameter(torch.zeros_like(partition(rows["value"]))))
    whole = {key: _of(row, parameters) for key, row in rows.items()}
    states: dict[Tensor, FullParamState] = {
        parameter: FullParamState(
            whole["value"][number],
            {key: whole[key][number] for key in MOMENTS},
            {"step": torch.tensor(3.0)},
        )
        for number, parameter in enumerate(parameters)
    }
    scatter_full_state(fresh, states)
    (own,), (other,) = view.optimizer.state, fresh.optimizer.state
    pairs = {
        key: (view.optimizer.state[own][key], fresh.optimizer.state[other][key]) for key in MOMENTS
    }
    pairs["value"] = own, other
    return [key for key, (one, two) in pairs.items() if not _same(one.detach(), two.detach())]


def test_a_full_state_is_written_into_a_new_optimizer(ranks: Ranks) -> None:
    assert ranks(3, _scattered) == [[]] * 3
