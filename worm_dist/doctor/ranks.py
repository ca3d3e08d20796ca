"""The ranks: whether they reach one another, where they run, and what an all-reduce takes."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ..planning.formatting import seconds
from .finding import Finding, ok

__all__ = ["RankPlace", "Reach", "reach"]

_ELEMENTS = 1 << 20
_ROUNDS = 5


@dataclass(frozen=True)
class RankPlace:
    """Host and device of a rank."""

    rank: int
    host: str
    device: str


@dataclass(frozen=True)
class Reach:
    """How the ranks reach one another.

    Attributes:
        backend: the backend of ``torch.distributed``.
        ranks: the place of every rank.
        all_reduce_seconds: by number of bytes, the median time of an all-reduce on this rank.
    """

    backend: str
    ranks: Sequence[RankPlace]
    all_reduce_seconds: dict[int, float]

    @property
    def findings(self) -> list[Finding]:
        if len(self.ranks) == 1:
            return [ok("backend", f"{self.backend} on {self.ranks[0].device}")]
        times = ", ".join(
            f"{bytes_:,} bytes in {seconds(taken)}"
            for bytes_, taken in self.all_reduce_seconds.items()
        )
        hosts: dict[str, list[RankPlace]] = {}
        for place in self.ranks:
            hosts.setdefault(place.host, []).append(place)
        return [
            ok("backend", f"{self.backend}: all {len(self.ranks)} ranks reach one another"),
            ok("backend", f"all-reduce of {times}"),
            *(
                ok("ranks", f"{host}: {', '.join(f'{p.rank} on {p.device}' for p in places)}")
                for host, places in hosts.items()
            ),
        ]


def reach(device: torch.device) -> Reach:
    """Exchange places and measure an all-reduce in the default process group.  Collective.

    Args:
        device: this rank's device.
    """
    own = RankPlace(dist.get_rank(), socket.gethostname(), str(device))
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, own)
    sizes = (1, _ELEMENTS) if len(places) > 1 else ()
    taken = {4 * size: _measured(size, device) for size in sizes}
    return Reach(dist.get_backend(), places, taken)


def _measured(num_elements: int, device: torch.device) -> float:
    """Median time of an all-reduce of so many float32 elements, in seconds.  Collective."""
    values = torch.ones(num_elements, device=device)
    times = []
    for _ in range(1 + _ROUNDS):
        began = time.perf_counter()
        dist.all_reduce(values)
        values.fill_(float(values[0].item() > 0))  # waits for the device
        times.append(time.perf_counter() - began)
    return median(times[1:])  # the first one opens connections
