"""Launch: which process this is, and the process group it joins."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from ..errors import BackendError
from . import mpi, slurm
from .launchers import SRUN, TORCHRUN, require_agreement, started_by, whole_number
from .rendezvous import meet
from .restart_attempt import part_of_this_attempt

__all__ = ["RankInfo", "process_group"]

Backend = Literal["auto", "gloo", "nccl"]

_SECONDS_LATER = 30
"""By which a collective's own timeout comes after the watch, which names the rank that is missing;
nccl's would abort the process."""
_SECONDS_TO_ANSWER = 2


@dataclass(frozen=True)
class RankInfo:
    """This process among those that a launcher started.

    Attributes:
        rank: 0 to world_size - 1, over all hosts.
        world_size: number of processes.
        local_rank: 0 and up, on this host; also the number of its GPU.
        local_world_size: number of processes on this host.
        address, port: where rank zero waits for the others; a process alone waits nowhere.

    Raises:
        BackendError: the numbers contradict one another.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1
    address: str = ""
    port: int = 0

    def __post_init__(self) -> None:
        for number, below, size, name in (
            ("RANK", self.rank, self.world_size, "WORLD_SIZE"),
            ("LOCAL_RANK", self.local_rank, self.local_world_size, "LOCAL_WORLD_SIZE"),
        ):
            if not 0 <= below < size:
                raise BackendError(f"launch: {number} {below} is not below {name} {size}")
        if self.world_size > 1 and self.address and not 0 < self.port < 2**16:
            raise BackendError(f"launch: MASTER_PORT {self.port} is no port; choose 1 to 65535")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """Read what torchrun, deepspeed, mpirun or srun says; a plain process is a world of one.

        Collective if mpirun started this process: its ranks agree on where to meet.

        Raises:
            BackendError: the variables are incomplete, are no numbers, or contradict one another;
                mpirun and mpi4py do not belong together.
        """
        launcher = started_by(environment)
        if launcher is None:
            return cls(0, 1, 0)
        if launcher == TORCHRUN:
            require_agreement(environment)
            return cls._from_words_of_torchrun(environment)
        if launcher == SRUN:
            return cls._from_words_of_torchrun(slurm.torchrun_environment(environment))
        return cls._from_words_of_torchrun(mpi.torchrun_environment(environment, launcher))

    @classmethod
    def _from_words_of_torchrun(cls, said: Mapping[str, str]) -> RankInfo:
        needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
        if said.get("WORLD_SIZE") != "1":
            needed += ["MASTER_ADDR", "MASTER_PORT"]
        missing = [name for name in needed if name not in said]
        if missing:
            given = [name for name in needed if name in said]
            raise BackendError(
                f"launch: {', '.join(given)} set, but not {', '.join(missing)}; start with "
                "torchrun, or unset them to run one process"
            )
        local_rank = whole_number(said, "LOCAL_RANK")
        # deepspeed has a name of its own for it.  A launcher that does not say how many there are
        # has started at least this one.
        sizes = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in said]
        return cls(
            whole_number(said, "RANK"),
            whole_number(said, "WORLD_SIZE"),
            local_rank,
            whole_number(said, sizes[0]) if sizes else local_rank + 1,
            said.get("MASTER_ADDR", ""),
            whole_number(said, "MASTER_PORT") if "MASTER_PORT" in said else 0,
        )

    @property
    def in_words_of_torchrun(self) -> dict[str, str]:
        """The variables that torch's own rendezvous and DeepSpeed read."""
        said = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }
        if self.address:
            said |= {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        return said


@contextmanager
def process_group(
    place: RankInfo, backend: Backend, timeout_seconds: float
) -> Iterator[torch.device]:
    """Join the other processes; yields the device to train on.

    Meanwhile the environment says where this process is in the words of torchrun, whoever started
    it.

    Raises:
        BackendError: the backend does not work here, or the others do not come in time; then it
            names who is missing.
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
    with _environment(place.in_words_of_torchrun):
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=_store(place, timeout_seconds),
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=timeout_seconds + _SECONDS_LATER),
                device_id=device if on_gpu else None,
            )
        except (RuntimeError, ValueError) as error:
            raise _did_not_join(place, error) from error
        try:
            yield device
        finally:
            dist.destroy_process_group()


def _store(place: RankInfo, timeout_seconds: float) -> Store:
    """Where the ranks learn of one another, when all have come."""
    if place.world_size == 1:
        return HashStore()  # One process needs no address and no port to meet itself.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connected(place, place.rank == 0 and not of_agent, timeout_seconds)
    if of_agent:
        return part_of_this_attempt(store, place.rank, place.world_size, timeout_seconds)
    meet(store, place.rank, place.world_size, timeout_seconds)
    return store


def _connected(place: RankInfo, is_master: bool, timeout_seconds: float) -> Store:
    """Connect to the store.  On a thread: whoever has the port may take the call and never answer,
    and torch would wait for ever.

    Raises:
        RuntimeError: the store cannot be opened, or nothing that answers is there in time.
    """
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(
            TCPStore,
            place.address,
            place.port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        ).result(timeout_seconds + _SECONDS_TO_ANSWER)
    except FutureTimeout:
        raise RuntimeError("whoever listens there is not rank zero of this run") from None
    finally:
        pool.shutdown(wait=False)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _did_not_join(place: RankInfo, error: Exception) -> BackendError:
    where = f"{place.address}:{place.port}"
    if "EADDRINUSE" in str(error):
        return BackendError(
            f"launch: rank {place.rank} cannot wait for the others at {where}, the port is in use; "
            "set MASTER_PORT to a free one, or end the program that has it"
        )
    reason = str(error).strip().split("\n")[0]
    return BackendError(
        f"launch: rank {place.rank} of {place.world_size} could not join the others at {where}: "
        f"{reason}; see that all ranks were started, and that MASTER_ADDR names rank zero's host "
        "as the others reach it"
    )
