"""All collectives outside of gradient reduction.

Every rank calls the same methods in the same order, whatever its data.  A check costs one
all-reduce of the scores, one comparison of digests and one broadcast of a fixed-size verdict; none
of them grows with the history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..digest import digest_of
from ..errors import BackendError, DivergenceError
from .byte_streams import gather_streams

__all__ = [
    "Communicator",
    "Parts",
    "ProcessGroupComm",
    "SingleProcessComm",
    "bits",
    "uncounted",
]

Parts = Mapping[str, Mapping[str, bytes]]
"""Bytes that must be equal on all ranks: ``{what: {channel group: bytes}}``."""

_MOST_RANKS_NAMED = 8


def bits(groups: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The raw bytes of each channel group's tensor, for ``Communicator.assert_equal``."""
    return {name: tensor.cpu().numpy().tobytes() for name, tensor in groups.items()}


class Communicator(Protocol):
    """Collectives over the ranks that train one network; every method is collective.

    Attributes:
        rank: this process's rank, 0 to size - 1.
        size: number of ranks.
        sent_bytes: total size of the tensors given to these collectives so far.
    """

    rank: int
    size: int
    sent_bytes: int

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over the ranks; the result is bit-identical on all of them."""

    def all_reduce_disjoint(self, parts: Tensor) -> Tensor:
        """Assemble a float32 tensor whose non-zero elements are disjoint across the ranks.

        Args:
            parts: float32 tensor of any shape: this rank's elements, zero elsewhere.

        Returns:
            The complete tensor, with every element bit for bit as its rank has it.
        """

    def merge_disjoint(self, memory: Tensor) -> None:
        """Assemble memory whose non-zero bytes are disjoint across the ranks, in place.

        Args:
            memory: int32 ``[n]`` on the device of the collectives: this rank's bytes, zero
                elsewhere.
        """

    def gather_streams(
        self, stream: Sequence[Tensor], place: Callable[[int, int], Sequence[Tensor]]
    ) -> None:
        """Send the bytes of every rank to rank zero, in pieces; see ``byte_streams``."""

    def any(self, flag: Tensor) -> bool:
        """Whether a number ``[1]`` is above zero on any rank."""

    def assert_equal(self, parts: Parts, when: str) -> None:
        """Check that bytes are identical on all ranks.

        Args:
            parts: the bytes to compare.
            when: point of the run, for the error message.

        Raises:
            DivergenceError: on every rank, naming what differs, the ranks and the channel group.
        """

    def compare(self, texts: Mapping[str, str]) -> list[str]:
        """Compare texts across the ranks.

        Args:
            texts: this rank's texts by name.

        Returns:
            One line per difference, the same lines on every rank, such as ``lr is 0.1 on ranks 0,
            2, 0.2 on rank 1``; empty if all agree.
        """

    def failures(self, own: str) -> list[str]:
        """Collect the error messages of all ranks.

        Args:
            own: this rank's error message; empty if it has none.

        Returns:
            One line per distinct message, with its ranks; empty if no rank has failed.
        """

    def broadcast_from_rank0(self, decide: Callable[[], Tensor], size: int) -> Tensor:
        """Broadcast a decision that rank zero computes.

        Args:
            decide: function that returns the decision, float64 ``[size]``; called on rank zero
                only.
            size: number of elements of the decision.

        Returns:
            The decision, float64 ``[size]`` on the CPU, the same on every rank.

        Raises:
            BackendError: on the other ranks, if ``decide`` raised on rank zero.
        """


@contextmanager
def uncounted(comm: Communicator) -> Iterator[None]:
    """Context whose collectives do not add to ``sent_bytes``: those of saving and loading."""
    sent_bytes = comm.sent_bytes
    try:
        yield
    finally:
        comm.sent_bytes = sent_bytes


class SingleProcessComm:
    """The collectives of a single process, which has no process group."""

    rank = 0
    size = 1
    sent_bytes = 0

    def mean(self, values: Tensor) -> Tensor:
        return values

    def all_reduce_disjoint(self, parts: Tensor) -> Tensor:
        return parts

    def merge_disjoint(self, memory: Tensor) -> None:
        pass

    def gather_streams(
        self, stream: Sequence[Tensor], place: Callable[[int, int], Sequence[Tensor]]
    ) -> None:
        for part, to in zip(stream, place(0, sum(map(len, stream))), strict=True):
            to.copy_(part)

    def any(self, flag: Tensor) -> bool:
        return bool(flag > 0)

    def assert_equal(self, parts: Parts, when: str) -> None:
        pass

    def compare(self, texts: Mapping[str, str]) -> list[str]:
        return []

    def failures(self, own: str) -> list[str]:
        return [own] if own else []

    def broadcast_from_rank0(self, decide: Callable[[], Tensor], size: int) -> Tensor:
        return decide()


class ProcessGroupComm:
    """Collectives over a ``torch.distributed`` process group.

    Args:
        group: the process group in which the gradients are reduced.
        device: the device on which its collectives expect their tensors.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent_bytes = 0

    def mean(self, values: Tensor) -> Tensor:
        mean = values.to(self._device, copy=True).div_(self.size)
        self._count(mean)
        dist.all_reduce(mean, group=self._group)
        return mean

    def all_reduce_disjoint(self, parts: Tensor) -> Tensor:
        bits = parts.view(torch.int32).to(self._device, copy=True)
        self.merge_disjoint(bits)
        return bits.view(torch.float32)

    def merge_disjoint(self, memory: Tensor) -> None:
        # Summed as integers: a float sum would turn -0 into 0.  Nothing is carried from one byte to
        # the next, so elements may be of any size.
        assert memory.dtype == torch.int32
        self._count(memory)
        dist.all_reduce(memory, group=self._group)

    def gather_streams(
        self, stream: Sequence[Tensor], place: Callable[[int, int], Sequence[Tensor]]
    ) -> None:
        self.sent_bytes += sum(map(len, stream))
        gather_streams(stream, place, self._group, self._device)

    def any(self, flag: Tensor) -> bool:
        largest = flag.to(self._device, copy=True)
        self._count(largest)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return bool(largest > 0)

    def assert_equal(self, parts: Parts, when: str) -> None:
        # No backend detects that two ranks pack different channels of equal count.
        if not self._all_equal(torch.cat([_numbers(digest_of(g)) for g in parts.values()])):
            self._raise_divergence(parts, when)

    def compare(self, texts: Mapping[str, str]) -> list[str]:
        if self._all_equal(_numbers(digest_of(texts))):
            return []
        gathered = self._gather(dict(texts))
        lines = []
        for name in {name: None for theirs in gathered for name in theirs}:
            holders: dict[str, list[int]] = {}
            for rank, theirs in enumerate(gathered):
                holders.setdefault(theirs.get(name, "missing"), []).append(rank)
            if len(holders) > 1:
                values = (f"{text} on {_format_ranks(ranks)}" for text, ranks in holders.items())
                lines.append(f"{name} is {', '.join(values)}")
        return lines

    def failures(self, own: str) -> list[str]:
        if not self.any(torch.tensor([float(bool(own))])):
            return []
        holders: dict[str, list[int]] = {}
        for rank, theirs in enumerate(self._gather(own)):
            holders.setdefault(theirs, []).append(rank)
        return [f"{_format_ranks(ranks)}: {text}" for text, ranks in holders.items() if text]

    def _all_equal(self, numbers: Tensor) -> bool:
        """Whether int64 ``[n]``, each of 32 bits, is equal on all ranks."""
        # One MAX over [d, -d] gives both the largest and the smallest d.
        extremes = torch.stack([numbers, -numbers]).to(self._device)
        self._count(extremes)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        largest, minus_smallest = extremes.cpu()
        return torch.equal(largest, -minus_smallest)

    def _gather(self, own: Any) -> list[Any]:
        """Gather one object per rank; slow, so called only after a difference was found."""
        gathered: list[Any] = [None] * self.size
        # Under nccl objects are sent from the current device, which may not be this rank's.
        on_gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_gpu else nullcontext():
            dist.all_gather_object(gathered, own, group=self._group)
        return gathered

    def _raise_divergence(self, parts: Parts, when: str) -> NoReturn:
        gathered = self._gather(
            {
                (what, group): digest_of(value)
                for what, groups in parts.items()
                for group, value in groups.items()
            }
        )
        lines = []
        for what, group in {key: None for digests in gathered for key in digests}:
            values = [digests.get((what, group)) for digests in gathered]
            (reference, count), *_ = Counter(values).most_common(1)
            if count == self.size:
                continue
            # Without a majority rank zero is the reference.
            reference = reference if count > self.size / 2 else values[0]
            differing = [str(rank) for rank, value in enumerate(values) if value != reference]
            lines.append(f"{what} of group {group}: rank {', '.join(differing)} differs")
        raise DivergenceError(
            f"the ranks no longer hold the same network ({when}): "
            + "; ".join(lines)
            + ". Start again from the last checkpoint; look for rank-dependent code, data or seeds "
            "that reach the weights outside of the averaged gradients"
        )

    def broadcast_from_rank0(self, decide: Callable[[], Tensor], size: int) -> Tensor:
        decision = torch.full((size,), torch.nan, dtype=torch.float64)
        failure: Exception | None = None
        if self.rank == 0:
            try:
                decision = decide()
            except Exception as error:  # raised after the broadcast that the others wait in
                failure = error
        assert decision.shape == (size,) and decision.dtype == torch.float64
        decision = decision.to(self._device)
        self._count(decision)
        dist.broadcast(decision, group=self._group, group_src=0)
        if failure is not None:
            raise failure
        decision = decision.cpu()
        if bool(decision.isnan().all()):
            raise BackendError("rank 0 could not decide; see rank 0's own error")
        return decision

    def _count(self, tensor: Tensor) -> None:
        self.sent_bytes += tensor.numel() * tensor.element_size()


def _format_ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > _MOST_RANKS_NAMED:
        return f"{len(ranks)} ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _numbers(digest: bytes) -> Tensor:
    """A digest as int64 ``[len / 4]``, each of 32 bits, so that negation cannot overflow."""
    return torch.frombuffer(bytearray(digest), dtype=torch.int32).to(torch.int64)
