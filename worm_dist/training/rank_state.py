"""Own: what a rank has in its state that the others do not share."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from ..checkpoint.rng_state import random_state, restore_random_state
from .data.augmentation_rng import EpochSampler, seed_from

__all__ = [
    "gathered_on_rank_zero",
    "newest_inputs",
    "own_of",
    "own_state",
    "restore_random",
    "seed_all",
    "with_own",
    "without_own",
]


def own_state(losses: Tensor, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Of this rank.

    Args:
        losses: float64 ``[2]``, sum and number of the epoch's losses so far.
        engine: its state.
    """
    return {
        "random": random_state(),
        "losses": losses.tolist(),
        "reduction": engine["rank"]["reduction"],
        "watched": engine["rank"]["losses"],
    }


def gathered_on_rank_zero(own: Any) -> list[Any]:
    """What every rank has, by rank; empty elsewhere.  Collective."""
    is_zero = dist.get_rank() == 0
    everyone: list[Any] = [None] * dist.get_world_size() if is_zero else []
    dist.gather_object(own, everyone if is_zero else None, dst=0)
    return everyone


def own_of(everyone: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What this rank goes on with.  On another number of ranks, the losses are rank zero's; the
    random numbers are new ones."""
    rank = dist.get_rank()
    if len(everyone) == dist.get_world_size():
        return everyone[rank]
    sums = [sum(column) for column in zip(*(own["losses"] for own in everyone))]
    return {
        "random": None,
        "losses": sums if rank == 0 else [0.0, 0.0],
        "reduction": None,
        "watched": everyone[0]["watched"],
    }


def without_own(engine: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's state without what is this rank's own.

    Of the inputs that it remembers only the precision is left: the data have them, and of large
    images they take more than the network.
    """
    inputs = engine["rank"]["inputs"]
    calls = inputs and [{**call, "arguments": [], "on_cpu": []} for call in inputs]
    return {**engine, "rank": {"inputs": calls}}


def with_own(
    engine: Mapping[str, Any], own: Mapping[str, Any], inputs: Sequence[Tensor]
) -> dict[str, Any]:
    """What ``without_own`` has left out, put back.

    Args:
        engine: its state.
        own: of this rank.
        inputs: on the CPU, one for every pass that the engine remembered.
    """
    calls = engine["rank"]["inputs"]
    if calls is not None:
        calls = [
            {**call, "arguments": [[part], {}], "on_cpu": [call["device"] == "cpu"]}
            for call, part in zip(calls, inputs, strict=True)
        ]
    rank = {
        "number": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "inputs": calls,
        "reduction": own["reduction"],
        "losses": own["watched"],
    }
    return {**engine, "rank": rank}


def seed_all(seed: int) -> None:
    """The generators that a state has, alike on all ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random(state: Any, seed: int, step: int) -> None:
    """Go on with a state of the generators, or with new numbers where there is none."""
    if state is None:
        seed_all(seed_from(seed, dist.get_rank(), dist.get_world_size(), step))
    else:
        restore_random_state(state)


def newest_inputs(loader: DataLoader[Any], epoch: int, batch: int, count: int) -> list[Tensor]:
    """The inputs of this rank's newest batches, oldest first.

    Args:
        loader: of the training split.
        epoch, batch: the next batch.
        count: how many; fewer if there have not been so many.
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
