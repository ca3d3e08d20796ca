"""Ranks of a benchmark, and the network interface between them."""

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

__all__ = [
    "Link",
    "num_collectives",
    "over_ranks",
    "rate_text",
    "several_ranks",
    "two_ranks",
]

_TIMEOUT = 120.0
_LOOPBACK = "lo"
_RATE = re.compile(r"(\d+)([kmg]?)bit")
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@contextmanager
def two_ranks() -> Iterator[int]:
    """Join the other rank over gloo; yield this rank's number.

    Raises:
        BackendError: the world size is not 2.
    """
    rank_info = RankInfo.from_environment()
    if rank_info.world_size != 2:
        raise BackendError(
            f"bench: it needs exactly 2 ranks, but there are {rank_info.world_size}; "
            "start it with launch/netlab -- python -m worm_dist bench ..., or with torchrun "
            "--standalone --nproc-per-node 2 -m worm_dist bench ..."
        )
    with _joined(rank_info):
        yield rank_info.rank


@contextmanager
def several_ranks() -> Iterator[int]:
    """Join the other ranks over gloo; yield this rank's number.

    Raises:
        BackendError: there is no other rank.
    """
    rank_info = RankInfo.from_environment()
    if rank_info.world_size < 2:
        raise BackendError(
            "bench: it needs several ranks, but there is one; start it with launch/netlab --ranks "
            "4 -- python -m worm_dist bench ..., or with torchrun"
        )
    with _joined(rank_info):
        yield rank_info.rank


@contextmanager
def _joined(rank_info: RankInfo) -> Iterator[None]:
    torch.set_num_threads(1)
    with process_group(rank_info, "gloo", _TIMEOUT):
        yield


class Link:
    """Network interface between the ranks.

    Attributes:
        name: name of the interface.
        is_loopback: True if both ranks are on one host; the counter then includes both ranks and
            all other local traffic of the machine.
        network: the rate that launch/netlab was given; otherwise the interface's name.
    """

    def __init__(self) -> None:
        self.name = os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK)
        self.is_loopback = self.name == _LOOPBACK
        self.network = os.environ.get("NETLAB_RATE", self.name)
        self._counters = Path("/sys/class/net") / self.name / "statistics"

    def __str__(self) -> str:
        """The network for a heading, such as ``100 Mbit/s``."""
        return rate_text(self.network)

    @property
    def bits_per_second(self) -> float | None:
        """The rate; None if it is not limited or not known."""
        rate = _RATE.fullmatch(self.network)
        return None if rate is None else int(rate[1]) * _FACTORS[rate[2]]

    def sent_bytes(self) -> int:
        """Bytes that the kernel has transmitted over the interface so far.

        Raises:
            BackendError: the kernel has no such counter.
        """
        return self._read("tx_bytes")

    def sent_packets(self) -> int:
        """Packets that the kernel has transmitted over the interface so far.

        Raises:
            BackendError: the kernel has no such counter.
        """
        return self._read("tx_packets")

    def _read(self, counter: str) -> int:
        try:
            return int((self._counters / counter).read_text())
        except OSError as error:
            raise BackendError(
                f"bench wire: no transmit counter of interface {self.name!r} ({error}); run it "
                "on Linux, in launch/netlab"
            ) from error


def rate_text(network: str) -> str:
    """A network for a heading, such as ``100 Mbit/s`` for ``100mbit``."""
    rate = _RATE.fullmatch(network)
    if rate is None:
        return {"unlimited": "an unlimited link"}.get(network, network)
    return f"{rate[1]} {rate[2].upper()}bit/s"


def over_ranks(values: list[list[float]], op: dist.ReduceOp.RedOpType) -> list[list[float]]:
    """Reduce values over the ranks, element by element.  Collective.

    Args:
        values: rows of equal length, of the same shape on all ranks.
        op: ``SUM`` or ``MAX``.
    """
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, op=op)
    return [[float(value) for value in row] for row in reduced]


def num_collectives(group: dist.ProcessGroup) -> int:
    """Collectives of a group so far: its sequence number, which torch's debug mode compares across
    ranks."""
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
