"""State of the training loop: its position, and what differs from rank to rank, such as random
states, local losses and PowerSGD's memory."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.utils.data import DataLoader

from ..checkpoint.rng_state import random_state, require_random_state, restore_random_state
from ..distributed.byte_streams import gather_streams
from ..engine.state import RankSchema
from ..errors import CheckpointError
from ..groups.nested import mapped
from ..schema import Count, Finite, Schema
from .data.augmentation_rng import EpochSampler, seed_from

__all__ = [
    "Position",
    "PositionSchema",
    "RankStateSchema",
    "gathered_on_rank_zero",
    "newest_images",
    "num_inputs",
    "rank_state",
    "restore_random",
    "seed_all",
    "states_of_ranks",
    "with_inputs",
]


@dataclass
class Position:
    """Position between two optimizer steps.

    Attributes:
        epoch: the current epoch, counted from 0.
        batch: the next batch, counted from 0; after the last batch the epoch's test follows.
        draws: True while a draw, with the tests before and after it, is not finished.
        has_learnt: True if any test so far was better than chance.
        at_chance: True if the newest test was no better than chance.
        ticket_step: optimizer steps before the training of the ticket; None before the draw.
    """

    epoch: int = 0
    batch: int = 0
    draws: bool = False
    has_learnt: bool = False
    at_chance: bool = False
    ticket_step: int | None = None


class PositionSchema(Schema):
    """Schema of ``Position`` as a dict."""

    epoch: Count
    batch: Count
    draws: bool
    has_learnt: bool
    at_chance: bool
    ticket_step: Count | None


def _require_random(state: dict[str, Any]) -> dict[str, Any]:
    try:
        require_random_state(state)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    return state


class RankStateSchema(Schema):
    """Schema of ``rank_state``."""

    random: Annotated[dict[str, Any], AfterValidator(_require_random)]
    losses: Annotated[list[Finite], Field(min_length=2, max_length=2)]
    engine: RankSchema


def rank_state(losses: Tensor, engine: Mapping[str, Any]) -> dict[str, Any]:
    """State of this rank that other ranks do not share.

    Args:
        losses: float64 ``[2]``, sum and number of the epoch's losses so far.
        engine: the engine's state dict.
    """
    return {
        "random": random_state(),
        "losses": losses.tolist(),
        "engine": _without_tensors(engine["rank"]),
    }


def _without_tensors(engine: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's per-rank state without the tensors of the recorded inputs: they are read from the
    data set again on resume, and large images would take more space than the network."""
    training = engine["training"]
    inputs = training["inputs"]
    calls = inputs and [{**call, "arguments": [], "on_cpu": []} for call in inputs]
    return {**engine, "training": {**training, "inputs": calls}}


def gathered_on_rank_zero(
    state: Any, device: torch.device, most_bytes: int | None = None
) -> list[Any]:
    """Gather every rank's state on rank zero, in its host memory.  Collective.

    PowerSGD's error feedback is as large as the network, on every rank: all of it at once would not
    fit on rank zero's device, through which it goes under nccl.

    Args:
        state: this rank's state in plain values and tensors on any device.
        device: the device on which collectives expect their tensors.
        most_bytes: most bytes at a time on rank zero's device; see ``gather_streams``.

    Returns:
        On rank zero the states by rank, those of other ranks on the CPU; empty on other ranks.
    """
    rank = dist.get_rank()
    own: list[Tensor] = []
    if rank != 0:  # rank zero keeps its own
        file = io.BytesIO()
        torch.save(mapped(state, Tensor.cpu), file)
        own = [torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)]
    others: list[Tensor] = []

    def place(other: int, num_bytes: int) -> list[Tensor]:
        if other == 0:
            return []
        others.append(torch.empty(num_bytes, dtype=torch.uint8))
        return others[-1:]

    gather_streams(own, place, dist.group.WORLD, device, most_bytes)
    return [state, *map(_unpickled, others)] if rank == 0 else []


def _unpickled(state: Tensor) -> Any:
    return torch.load(io.BytesIO(state.numpy().data), map_location="cpu", weights_only=True)


def states_of_ranks(
    states: Sequence[Mapping[str, Any]], world_size: int
) -> list[Mapping[str, Any]]:
    """The states that the ranks resume from, by rank.

    If the world size has changed, rank zero takes over the sum of all losses, and the random states
    are seeded anew.

    Args:
        states: the saved states of all ranks, by rank.
        world_size: number of ranks that resume.
    """
    if len(states) == world_size:
        return list(states)
    sums = [sum(column) for column in zip(*(state["losses"] for state in states))]
    engine = states[0]["engine"]
    return [
        {
            "random": None,
            "losses": [0.0, 0.0] if rank else sums,
            "engine": {
                **engine,
                "number": rank,
                "world_size": world_size,
                "training": {**engine["training"], "reducer": None},
            },
        }
        for rank in range(world_size)
    ]


def num_inputs(state: Mapping[str, Any]) -> int:
    """Number of inputs that a rank's engine had recorded."""
    return len(state["engine"]["training"]["inputs"] or ())


def with_inputs(state: Mapping[str, Any], inputs: Sequence[Tensor]) -> dict[str, Any]:
    """A rank's state of its engine, with the recorded inputs read again.

    Args:
        state: this rank's state.
        inputs: the recorded input batches, on the network's device, one for every recorded pass.

    Raises:
        CheckpointError: there are fewer.
    """
    engine = state["engine"]
    calls = engine["training"]["inputs"]
    if calls is not None and len(calls) != len(inputs):
        raise CheckpointError(
            f"--resume: ranks.{engine['number']}.engine.training.inputs: {len(calls)} recorded "
            f"passes, but only {len(inputs)} before position"
        )
    if calls is not None:
        calls = [
            {**call, "arguments": [[part], {}], "on_cpu": [call["device"] == "cpu"]}
            for call, part in zip(calls, inputs, strict=True)
        ]
    return {**engine, "training": {**engine["training"], "inputs": calls}}


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, alike on all ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random(state: Any, seed: int, step: int) -> None:
    """Restore the state of the generators; seed them anew if there is no state."""
    if state is None:
        seed_all(seed_from(seed, dist.get_rank(), dist.get_world_size(), step))
    else:
        restore_random_state(state)


def newest_images(loader: DataLoader[Any], epoch: int, batch: int, count: int) -> list[Tensor]:
    """Load the images of this rank's newest batches again, oldest first, on the host.

    Args:
        loader: the loader of the training split.
        epoch, batch: the position of the next batch.
        count: number of batches; fewer are returned if training has not had so many.
    """
    sampler, size, per_epoch = loader.sampler, loader.batch_size, len(loader)
    assert isinstance(sampler, EpochSampler) and size is not None
    now = epoch * per_epoch + batch
    inputs = []
    for number in range(max(0, now - count), now):
        epoch, batch = divmod(number, per_epoch)
        sampler.start_at(epoch, batch * size)
        samples = [loader.dataset[key] for key in islice(sampler, size)]
        inputs.append(loader.collate_fn(samples)[0])
    return inputs
