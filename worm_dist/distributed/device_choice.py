"""Whether all ranks train on GPUs or all on CPUs, and which GPU is whose.

The ranks decide together: a host without GPUs would choose gloo and wait for those that chose nccl.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from ..errors import BackendError

__all__ = ["Backend", "Place", "own_place", "trains_on_gpus"]

Backend = Literal["auto", "gloo", "nccl"]

_MOST_HOSTS_NAMED = 8


class Place(NamedTuple):
    """Where a rank runs.

    Attributes:
        host: name of the host.
        local_rank: rank on this host.
        local_world_size: number of ranks on this host.
        gpus: the identities of the GPUs that this process sees, by index; unique over all hosts.
    """

    host: str
    local_rank: int
    local_world_size: int
    gpus: tuple[str, ...]

    @property
    def gpu_index(self) -> int | None:
        """Index of the GPU that this rank would use; None if there are too few for all ranks.

        A launcher may show each process one GPU only, its own, which then has index 0 everywhere.
        Whether it is the only one for many processes, ``trains_on_gpus`` finds out.
        """
        if len(self.gpus) >= self.local_world_size:
            return self.local_rank
        return 0 if len(self.gpus) == 1 else None

    @property
    def gpu(self) -> str | None:
        """Identity of the GPU that this rank would use."""
        return None if self.gpu_index is None else self.gpus[self.gpu_index]

    @property
    def text(self) -> str:
        """This place, for other ranks."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: str) -> Place:
        """Rebuild a place from its ``text``."""
        host, local_rank, local_world_size, gpus = json.loads(text)
        return cls(host, local_rank, local_world_size, tuple(gpus))


def own_place(backend: Backend, local_rank: int, local_world_size: int) -> Place:
    """Where this process runs; without looking for GPUs if the backend is gloo.

    Raises:
        BackendError: there are GPUs, but CUDA does not work.
    """
    host = socket.gethostname()
    if backend == "gloo":
        return Place(host, local_rank, local_world_size, ())
    try:
        gpus = tuple(
            str(torch.cuda.get_device_properties(index).uuid)
            for index in range(torch.cuda.device_count())
        )
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise BackendError(
            f"distributed.backend: the GPUs of {host} cannot be used: {reason}; call nvidia-smi "
            "there, or choose gloo, which trains on CPUs"
        ) from error
    return Place(host, local_rank, local_world_size, gpus)


def trains_on_gpus(backend: Backend, places: Sequence[Place]) -> bool:
    """Whether the ranks train on GPUs, over nccl, or else on CPUs, over gloo.

    Args:
        backend: ``auto`` is nccl if every rank has a GPU for itself, and gloo if none has.
        places: the place of every rank.

    Raises:
        BackendError: not every rank has a GPU for itself, and nccl is chosen or other ranks have
            one; the message names the hosts.
    """
    if backend == "gloo":
        return False
    users = Counter(place.gpu for place in places)
    without = [place for place in places if place.gpu is None or users[place.gpu] > 1]
    if not without:
        return True
    if backend == "nccl":
        raise BackendError(
            f"distributed.backend: nccl needs a GPU for each rank, but {_hosts(without, places)}; "
            "start fewer processes there, or choose gloo, which trains on CPUs"
        )
    if len(without) < len(places):
        others = [place for place in places if place not in without]
        raise BackendError(
            "distributed.backend: some ranks have a GPU for themselves and others have not: "
            f"{_hosts(without, places)}, but {_hosts(others, places)}; start as many ranks on each "
            "host as it has GPUs, or choose gloo, which trains on CPUs"
        )
    return False


def _hosts(named: Sequence[Place], places: Sequence[Place]) -> str:
    """What the hosts of some places have."""
    hosts = list(dict.fromkeys(place.host for place in named))
    parts = []
    for host in hosts[:_MOST_HOSTS_NAMED]:
        here = [place for place in places if place.host == host]
        gpus = {gpu for place in here for gpu in place.gpus}
        parts.append(f"{host} has {_count(len(gpus), 'GPU')} for {_count(len(here), 'rank')}")
    if len(hosts) > len(parts):
        parts.append(f"{len(hosts) - len(parts)} more hosts likewise")
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
