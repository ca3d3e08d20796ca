"""Agree: everything that the ranks tell one another outside of gradient reduction.

Every rank calls the same methods in the same order, whatever its data.  A check costs one sum of
the scores, one comparison of digests and one broadcast of a verdict of fixed size; none of them
grows with the history.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BackendError, DivergenceError

__all__ = ["Communicator", "Parts", "ProcessGroupComm", "SingleProcessComm", "bits"]

Parts = Mapping[str, Mapping[str, bytes]]
"""What must be equal on all ranks: ``{what: {group: bytes}}``."""

_MOST_RANKS_NAMED = 8


def bits(groups: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The bits of a tensor for each group, to be compared."""
    return {name: tensor.cpu().numpy().tobytes() for name, tensor in groups.items()}


class Communicator(Protocol):
    """The processes that train one network together."""

    rank: int
    size: int
    sent_bytes: int
    """Handed to these collectives so far."""

    def mean(self, values: Tensor) -> Tensor:
        """The average of a tensor over the ranks, the same bits on each."""

    def joined(self, parts: Tensor) -> Tensor:
        """A float32 tensor of which every rank has some elements and zeros elsewhere, whole and bit
        for bit on each."""

    def any(self, flag: Tensor) -> bool:
        """Whether a number ``[1]`` is above zero on any rank."""

    def require_equal(self, parts: Parts, when: str) -> None:
        """Compare bits across the ranks.

        Raises:
            DivergenceError: on every rank, naming what differs, the ranks and the group.
        """

    def differences(self, said: Mapping[str, str]) -> list[str]:
        """Compare words across the ranks; every rank says the same things.

        Returns:
            Empty if all agree; else, on every rank, such as ``lr is 0.1 on ranks 0, 2, 0.2 on rank
            1``.
        """

    def failures(self, own: str) -> list[str]:
        """What went wrong on which ranks; empty if nothing did.

        Args:
            own: what went wrong on this one; empty if nothing did.
        """

    def decided_by_rank_zero(self, decide: Callable[[], Tensor], size: int) -> Tensor:
        """Rank zero's float64 ``[size]``, on every rank; nobody else calls ``decide``.

        Raises:
            BackendError: on the other ranks, if ``decide`` raised on rank zero.
        """


class SingleProcessComm:
    """One process without a process group."""

    rank = 0
    size = 1
    sent_bytes = 0

    def mean(self, values: Tensor) -> Tensor:
        return values

    def joined(self, parts: Tensor) -> Tensor:
        return parts

    def any(self, flag: Tensor) -> bool:
        return bool(flag > 0)

    def require_equal(self, parts: Parts, when: str) -> None:
        pass

    def differences(self, said: Mapping[str, str]) -> list[str]:
        return []

    def failures(self, own: str) -> list[str]:
        return [own] if own else []

    def decided_by_rank_zero(self, decide: Callable[[], Tensor], size: int) -> Tensor:
        return decide()


class ProcessGroupComm:
    """The ranks of a process group.

    Args:
        group: the process group that the gradients are reduced in.
        device: where its collectives expect their tensors.
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

    def joined(self, parts: Tensor) -> Tensor:
        # As whole numbers: a float's -0 would come out of the sum as 0.
        bits = parts.view(torch.int32).to(self._device, copy=True)
        self._count(bits)
        dist.all_reduce(bits, group=self._group)
        return bits.view(torch.float32)

    def any(self, flag: Tensor) -> bool:
        largest = flag.to(self._device, copy=True)
        self._count(largest)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return bool(largest > 0)

    def require_equal(self, parts: Parts, when: str) -> None:
        # No backend can see that two ranks pack different channels of equal count.
        if not self._all_have(torch.cat([_numbers(_digest(g)) for g in parts.values()])):
            self._explain(parts, when)

    def differences(self, said: Mapping[str, str]) -> list[str]:
        texts = {name: text.encode() for name, text in said.items()}
        if self._all_have(_numbers(_digest(texts))):
            return []
        everyone = self._gathered(dict(said))
        lines = []
        for name in {name: None for theirs in everyone for name in theirs}:
            holders: dict[str, list[int]] = {}
            for rank, theirs in enumerate(everyone):
                holders.setdefault(theirs.get(name, "missing"), []).append(rank)
            if len(holders) > 1:
                values = (f"{text} on {_counted(on)}" for text, on in holders.items())
                lines.append(f"{name} is {', '.join(values)}")
        return lines

    def failures(self, own: str) -> list[str]:
        if not self.any(torch.tensor([float(bool(own))])):
            return []
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(self._gathered(own)):
            ranks.setdefault(theirs, []).append(rank)
        return [f"{_counted(on)}: {text}" for text, on in ranks.items() if text]

    def _all_have(self, numbers: Tensor) -> bool:
        """Whether int64 ``[n]`` of 32 bits each are equal on all ranks."""
        # The MAX of [d, -d] shows the largest and the smallest d at once: equal if all are.
        extremes = torch.stack([numbers, -numbers]).to(self._device)
        self._count(extremes)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        largest, minus_smallest = extremes.cpu()
        return torch.equal(largest, -minus_smallest)

    def _gathered(self, own: Any) -> list[Any]:
        """An object of every rank.  Where all have seen a difference, all may afford it."""
        everyone: list[Any] = [None] * self.size
        # Under nccl objects travel through the current device, which may not be this rank's.
        on_gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_gpu else nullcontext():
            dist.all_gather_object(everyone, own, group=self._group)
        return everyone

    def _explain(self, parts: Parts, when: str) -> None:
        everyone = self._gathered(
            {
                (what, group): hashlib.blake2b(value, digest_size=8).hexdigest()
                for what, groups in parts.items()
                for group, value in groups.items()
            }
        )
        lines = []
        for what, group in {key: None for digests in everyone for key in digests}:
            values = [digests.get((what, group)) for digests in everyone]
            (usual, votes), *_ = Counter(values).most_common(1)
            if votes == self.size:
                continue
            # Without a majority rank zero is the reference.
            usual = usual if votes > self.size / 2 else values[0]
            odd = [str(rank) for rank, value in enumerate(values) if value != usual]
            lines.append(f"{what} of group {group}: rank {', '.join(odd)} differs")
        raise DivergenceError(
            f"the ranks no longer hold the same network ({when}): "
            + "; ".join(lines)
            + ". Start again from the last checkpoint; look for rank-dependent code, data or seeds "
            "that reach the weights outside of the averaged gradients"
        )

    def decided_by_rank_zero(self, decide: Callable[[], Tensor], size: int) -> Tensor:
        decision = torch.full((size,), torch.nan, dtype=torch.float64)
        failure: Exception | None = None
        if self.rank == 0:
            try:
                decision = decide()
            except Exception as error:  # the others must not wait for a verdict that never comes
                failure = error
        assert decision.shape == (size,) and decision.dtype == torch.float64
        decision = decision.to(self._device)
        self._count(decision)
        dist.broadcast(decision, group=self._group, group_src=0)
        if failure is not None:
            raise failure
        if bool(decision.isnan().all()):
            raise BackendError("rank 0 could not decide; its own error says why")
        return decision.cpu()

    def _count(self, payload: Tensor) -> None:
        self.sent_bytes += payload.numel() * payload.element_size()


def _counted(ranks: Sequence[int]) -> str:
    if len(ranks) > _MOST_RANKS_NAMED:
        return f"{len(ranks)} ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _digest(groups: Mapping[str, bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(groups.items()):
        digest.update(f"{name}:{len(value)}:".encode())
        digest.update(value)
    return digest.digest()


def _numbers(digest: bytes) -> Tensor:
    """int64 ``[len / 4]``; of 32 bits each, so that their negatives are numbers too."""
    return torch.frombuffer(bytearray(digest), dtype=torch.int32).to(torch.int64)
