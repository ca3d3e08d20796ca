"""Launch: which process this is, and the process group it joins."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from ..errors import BackendError

__all__ = ["Place", "process_group"]

Backend = Literal["auto", "gloo", "nccl"]


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started.

    Attributes:
        rank: 0 to world_size - 1, over all hosts.
        world_size: number of processes.
        local_rank: 0 and up, on this host; also the number of its GPU.
        local_world_size: number of processes on this host.

    Raises:
        BackendError: the numbers contradict one another.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise BackendError(
                f"launch: RANK {self.rank} is not below WORLD_SIZE {self.world_size}"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """Read what torchrun set; a plain process is a world of one.

        Raises:
            BackendError: the variables are incomplete or are no numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = [name for name in names if name in environment]
        if not given:
            return cls(0, 1, 0)
        if len(given) < len(names):
            missing = ", ".join(name for name in names if name not in environment)
            raise BackendError(
                f"launch: {', '.join(given)} set, but not {missing}; start with torchrun, or unset "
                "them to run one process"
            )
        try:
            rank, world_size, local_rank = (int(environment[name]) for name in names)
            # A launcher that does not say how many there are has started at least this one.
            local_world_size = int(environment.get("LOCAL_WORLD_SIZE", local_rank + 1))
        except ValueError:
            values = ", ".join(f"{name}={environment[name]!r}" for name in names)
            raise BackendError(f"launch: {values}: all must be whole numbers") from None
        return cls(rank, world_size, local_rank, local_world_size)


@contextmanager
def process_group(place: Place, backend: Backend, timeout_seconds: float) -> Iterator[torch.device]:
    """Join the other processes; yields the device to train on.

    Raises:
        BackendError: the backend does not work here, or the others do not come in time.
    """
    gpus = torch.cuda.device_count()
    if backend == "nccl" and place.local_rank >= gpus:
        raise BackendError(
            f"distributed.backend: nccl needs a GPU for local rank {place.local_rank}, but this "
            f"host has {gpus}; start fewer processes, or choose gloo"
        )
    # One choice for all processes of a host: were each to look for its own GPU, the first would
    # join nccl and the others gloo, and wait for one another.
    on_gpu = backend == "nccl" or (backend == "auto" and 0 < place.local_world_size <= gpus)
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # One process needs no address and no port to meet itself.
    store = HashStore() if place.world_size == 1 else None
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"launch: rank {place.rank} could not join: {error}") from error
    try:
        yield device
    finally:
        dist.destroy_process_group()
