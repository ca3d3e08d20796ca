"""Rank information from the launcher, and initialization of the process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from ..errors import BackendError
from . import mpi, slurm
from .backend_environment import variables_of_backend
from .device_choice import Backend, Place, own_place, trains_on_gpus
from .file_limit import require_file_descriptors
from .launchers import SRUN, TORCHRUN, read_int, require_agreement, started_by
from .rendezvous import agree, store_of_this_attempt
from .timeouts import group_timeout

__all__ = ["RankInfo", "process_group"]

_SECONDS_TO_CONNECT = 2
"""How much longer this process waits for the store than the store's own timeout."""


@dataclass(frozen=True)
class RankInfo:
    """This process's rank and the rendezvous address, as assigned by the launcher.

    Attributes:
        rank: rank over all hosts, 0 to world_size - 1.
        world_size: number of processes.
        local_rank: rank on this host, 0 to local_world_size - 1.
        local_world_size: number of processes on this host.
        address: host name or IP address of the store on rank zero; empty for a single process.
        port: TCP port of that store; 0 for a single process.

    Raises:
        BackendError: the values contradict one another.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1
    address: str = ""
    port: int = 0

    def __post_init__(self) -> None:
        for rank_name, rank, size, size_name in (
            ("RANK", self.rank, self.world_size, "WORLD_SIZE"),
            ("LOCAL_RANK", self.local_rank, self.local_world_size, "LOCAL_WORLD_SIZE"),
        ):
            if not 0 <= rank < size:
                raise BackendError(f"launch: {rank_name} {rank} is not below {size_name} {size}")
        if self.world_size > 1 and self.address and not 0 < self.port < 2**16:
            raise BackendError(f"launch: MASTER_PORT {self.port} is no port; choose 1 to 65535")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """Read the variables of torchrun, deepspeed, mpirun or srun.

        Without a launcher the world size is 1.  Collective if mpirun started this process: its
        ranks then agree on the address and port.

        Args:
            environment: environment variables of the process.

        Raises:
            BackendError: variables are missing, are no integers, or contradict one another; or
                mpi4py belongs to another mpirun.
        """
        launcher = started_by(environment)
        if launcher is None:
            return cls(0, 1, 0)
        if launcher == TORCHRUN:
            require_agreement(environment)
            return cls._from_torchrun_environment(environment)
        if launcher == SRUN:
            return cls._from_torchrun_environment(slurm.torchrun_environment(environment))
        return cls._from_torchrun_environment(mpi.torchrun_environment(environment, launcher))

    @classmethod
    def _from_torchrun_environment(cls, variables: Mapping[str, str]) -> RankInfo:
        needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
        if variables.get("WORLD_SIZE") != "1":
            needed += ["MASTER_ADDR", "MASTER_PORT"]
        missing = [name for name in needed if name not in variables]
        if missing:
            given = [name for name in needed if name in variables]
            raise BackendError(
                f"launch: {', '.join(given)} set, but not {', '.join(missing)}; start with "
                "torchrun, or unset them to run one process"
            )
        local_rank = read_int(variables, "LOCAL_RANK")
        # deepspeed calls it LOCAL_SIZE; without either there are at least local_rank + 1 processes.
        sizes = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in variables]
        return cls(
            read_int(variables, "RANK"),
            read_int(variables, "WORLD_SIZE"),
            local_rank,
            read_int(variables, sizes[0]) if sizes else local_rank + 1,
            variables.get("MASTER_ADDR", ""),
            read_int(variables, "MASTER_PORT") if "MASTER_PORT" in variables else 0,
        )

    @property
    def torchrun_environment(self) -> dict[str, str]:
        """The environment variables that torch's own rendezvous and DeepSpeed read."""
        variables = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }
        if self.address:
            variables |= {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        return variables


@contextmanager
def process_group(
    rank_info: RankInfo, backend: Backend, timeout_seconds: float
) -> Iterator[torch.device]:
    """Initialize the default process group; destroy it on exit.  Collective.

    Inside the context the environment has torchrun's variables, whichever launcher was used.

    Args:
        rank_info: this process's rank information.
        backend: backend of ``torch.distributed``; ``auto`` is nccl if every rank has a GPU for
            itself, else gloo.
        timeout_seconds: limit on the wait for the other ranks.

    Yields:
        The device to train on.

    Raises:
        BackendError: the backend does not work here, this process may not open enough connections,
            some hosts have GPUs and others have not, or not all ranks join in time; the message
            names the ranks or hosts.
    """
    with _environment(rank_info.torchrun_environment):
        try:
            place = _place_or_obstacle(rank_info, backend)  # before others connect to the store
            store = _store(rank_info, timeout_seconds)
            device = _agreed_device(store, rank_info, backend, place, timeout_seconds)
        except BackendError:
            raise
        except (RuntimeError, ValueError) as error:
            raise _join_error(rank_info, error) from error
        with _environment(variables_of_backend(rank_info.world_size, device, os.environ)):
            try:
                _initialize(store, rank_info, device, timeout_seconds)
            except (RuntimeError, ValueError) as error:
                raise _join_error(rank_info, error) from error
            try:
                yield device
            finally:
                dist.destroy_process_group()


def _initialize(
    store: Store, rank_info: RankInfo, device: torch.device, timeout_seconds: float
) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        timeout=group_timeout(timeout_seconds),
        device_id=device if on_gpu else None,
    )


def _place_or_obstacle(rank_info: RankInfo, backend: Backend) -> Place | BackendError:
    """This rank's place; or why it cannot take part, for the other ranks to be told too."""
    try:
        require_file_descriptors(rank_info.rank, rank_info.world_size)
        return own_place(backend, rank_info.local_rank, rank_info.local_world_size)
    except BackendError as error:
        return error


def _agreed_device(
    store: Store,
    rank_info: RankInfo,
    backend: Backend,
    place: Place | BackendError,
    timeout_seconds: float,
) -> torch.device:
    """Wait for all ranks, and agree with them on the kind of device.  Collective."""
    kind = agree(
        store,
        rank_info.rank,
        rank_info.world_size,
        place.text if isinstance(place, Place) else place,
        lambda texts: _kind_of_device(backend, [Place.from_text(text) for text in texts]),
        timeout_seconds,
    )
    if kind == "cpu":
        return torch.device("cpu")
    assert isinstance(place, Place) and place.gpu_index is not None
    return torch.device("cuda", place.gpu_index)


def _kind_of_device(backend: Backend, places: Sequence[Place]) -> str:
    return "cuda" if trains_on_gpus(backend, places) else "cpu"


def _store(rank_info: RankInfo, timeout_seconds: float) -> Store:
    """The store of this attempt, in which the ranks meet."""
    if rank_info.world_size == 1:
        return HashStore()  # in memory: a single process needs no port
    is_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank_info.rank == 0 and not is_agent_store
    store = _connect(rank_info, is_master, timeout_seconds)
    if is_agent_store:
        return store_of_this_attempt(store, rank_info.rank, rank_info.world_size, timeout_seconds)
    return store


def _connect(rank_info: RankInfo, is_master: bool, timeout_seconds: float) -> Store:
    """Connect to the store, in a thread: a foreign program at that port may accept the connection
    and never answer, and torch would wait forever.

    Raises:
        RuntimeError: the store cannot be opened, or did not answer in time.
    """
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(
            TCPStore,
            rank_info.address,
            rank_info.port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        ).result(timeout_seconds + _SECONDS_TO_CONNECT)
    except FutureTimeout:
        raise RuntimeError("the program at that port is not rank zero of this run") from None
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


def _join_error(rank_info: RankInfo, error: Exception) -> BackendError:
    where = f"{rank_info.address}:{rank_info.port}"
    if "EADDRINUSE" in str(error):
        return BackendError(
            f"launch: rank {rank_info.rank} cannot open its store at {where}, the port is in use; "
            "set MASTER_PORT to a free one, or end the program that uses it"
        )
    reason = str(error).strip().split("\n")[0]
    return BackendError(
        f"launch: rank {rank_info.rank} of {rank_info.world_size} could not join the others at "
        f"{where}: {reason}; check that all ranks were started, and that MASTER_ADDR names rank "
        "zero's host as the others reach it"
    )
