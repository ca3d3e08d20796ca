"""Place: the two ranks of a benchmark, and the network between them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from ..distributed.init import RankInfo, process_group
from ..errors import BackendError

__all__ = ["Link", "over_ranks", "two_ranks"]

_TIMEOUT = 120.0
_LOOPBACK = "lo"


@contextmanager
def two_ranks() -> Iterator[int]:
    """Join the other rank over gloo; yields this one's number.

    Raises:
        BackendError: there are not two.
    """
    place = RankInfo.from_environment()
    if place.world_size != 2:
        raise BackendError(
            f"bench: it measures what two ranks tell one another, but there are {place.world_size};"
            " start it with launch/netlab -- python -m worm_dist bench ..., or with torchrun "
            "--standalone --nproc-per-node 2 -m worm_dist bench ..."
        )
    torch.set_num_threads(1)
    with process_group(place, "gloo", _TIMEOUT):
        yield place.rank


class Link:
    """The network interface that the ranks talk over.

    Attributes:
        name: of the interface.
        is_loopback: both ranks are on one host; what both send is counted, and what everybody
            else on this machine tells himself is counted with it.
        network: how fast it is, as launch/netlab was told; else its name.
    """

    def __init__(self) -> None:
        self.name = os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK)
        self.is_loopback = self.name == _LOOPBACK
        self.network = os.environ.get("NETLAB_RATE", self.name)
        self._counter = Path("/sys/class/net") / self.name / "statistics" / "tx_bytes"

    def __str__(self) -> str:
        """For a heading."""
        rate = re.fullmatch(r"(\d+)([kmg]?)bit", self.network)
        if rate is None:
            return {"unlimited": "an unlimited link"}.get(self.network, self.network)
        return f"{rate[1]} {rate[2].upper()}bit/s"

    def sent_bytes(self) -> int:
        """What the kernel has transmitted over the interface so far.

        Raises:
            BackendError: the kernel does not tell.
        """
        try:
            return int(self._counter.read_text())
        except OSError as error:
            raise BackendError(
                f"bench wire: no transmit counter of interface {self.name!r} ({error}); run it "
                "on Linux, in launch/netlab"
            ) from error


def over_ranks(values: list[list[float]], how: dist.ReduceOp.RedOpType) -> list[list[float]]:
    """Sum or maximum of the two ranks' values, element by element.  Collective."""
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, op=how)
    return [[float(value) for value in row] for row in reduced]
