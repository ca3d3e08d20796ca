"""Payload: how many bytes a step may send, counted from flags; and what was really handed over."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.handed_over import handed_over, num_exchanged
from tests.zero.layout import layout
from tests.zero.row import Row

__all__ = ["Overheard", "Payload", "dense_payload_of", "payload_of", "shares_of"]

Groups = Sequence[Sequence[str]]
Flags = Mapping[str, Tensor]


class Payload(NamedTuple):
    """Bytes.

    Attributes:
        gradients: that all ranks reduce.
        share: this rank's share of what all ranks tell of their weights.
        told: what this rank tells of its own, padding included.
    """

    gradients: int
    share: int
    told: int


def dense_payload_of(row: Row, groups: Groups, network: nn.Module) -> Payload:
    """Of a step that sends everything: gradients, and a partition with its padding."""
    named = network.named_parameters()
    whole = {name: torch.ones_like(p, dtype=torch.bool) for name, p in named}
    gathered = sum(_laid_out(row, [whole[name] for name in group]).numel() for group in groups)
    if row.stage == 3:
        return Payload(_gradients(row, groups, whole), 0, 0)
    weights = gathered // row.world_size * row.dtype.itemsize if _gathers(row) else 0
    return Payload(_gradients(row, groups, whole), weights, weights)


def payload_of(row: Row, groups: Groups, reduced: Flags, gathered: Flags) -> Payload:
    """Gradients of live elements, and in stages 1 and 2 the live weights of a partition.

    Args:
        groups: names of the parameters in the optimizer's groups.
        reduced: for every parameter, which of its elements' gradients are sent.
        gathered: for every parameter, which of its elements are sent after the step.
    """
    gradients = _gradients(row, groups, reduced)
    if row.stage == 3:
        return Payload(gradients, 0, 0)
    if not _gathers(row):
        return Payload(gradients, 0, 0)
    rows = [_laid_out(row, [gathered[name] for name in group]) for group in groups]
    lives = [[int(part.sum()) for part in flags.chunk(row.world_size)] for flags in rows]
    size, share, told = row.dtype.itemsize, 0, 0
    for here in lives:
        handed = handed_over(here, size, dist.get_rank())
        share += handed.mean_gathered * size
        told += handed.gathered * size
    return Payload(gradients, share, told)


def _gathers(row: Row) -> bool:
    return row.stage > 0 and row.world_size > 1


def _gradients(row: Row, groups: Groups, reduced: Flags) -> int:
    flags = [reduced[name] for group in groups for name in group]
    if row.stage == 3:
        elements = row.world_size * largest_share(row.world_size, flags)
    else:
        elements = sum(int(flag.sum()) for flag in flags)
    return row.num_reductions * elements * row.sent_dtype.itemsize


def largest_share(world_size: int, flags: Sequence[Tensor]) -> int:
    """In stage 3: elements that are sent of the rank's parts that has most of them."""
    return max(shares_of(world_size, flags))


def shares_of(world_size: int, flags: Sequence[Tensor]) -> list[int]:
    """In stage 3 every parameter is cut by itself into equal parts, one for each rank: elements
    that are sent of each rank's parts.  If all are, padding is sent too."""
    if all(bool(flag.all()) for flag in flags):
        return [sum(-(-flag.numel() // world_size) for flag in flags)] * world_size
    shares = [0] * world_size
    for flag in flags:
        length = -(-flag.numel() // world_size)
        for rank in range(world_size):
            shares[rank] += int(flag.flatten()[rank * length : (rank + 1) * length].sum())
    return shares


def _laid_out(row: Row, flags: Sequence[Tensor]) -> Tensor:
    """A group's flags as DeepSpeed lays out its parameters, with padding between and behind."""
    in_turns = bool(row.zero.get("round_robin_gradients"))
    unit = 16 // row.dtype.itemsize if row.zero.get("parameter_alignment") else 1
    places, length = layout([flag.numel() for flag in flags], row.world_size, in_turns, unit)
    laid_out = torch.zeros(length, dtype=torch.bool)
    for flag, place in zip(flags, places):
        laid_out[place : place + flag.numel()] = flag.flatten()
    return laid_out


class Overheard:
    """Counts what is handed to torch.distributed.  Made before DeepSpeed is told of the processes.
    Sums of a single number are left out: norms and overflows are agreed on by those.

    Attributes:
        calls: number of calls by the function's name.
        heard: since the last call of ``take``: the functions' names and bytes, in order.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self.heard: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        for name, place in (
            ("all_reduce", 0),
            ("reduce", 0),
            ("all_gather", 1),
            ("all_gather_into_tensor", 1),
            ("all_gather_single", 1),
            ("reduce_scatter_tensor", 1),
            ("reduce_scatter_single", 1),
            ("broadcast", 0),
            ("all_to_all_single", 1),
        ):
            function = getattr(dist, name, None)
            if function is not None:
                setattr(dist, name, self._counted(function, place))

    def take(self) -> int:
        """Bytes since the last call."""
        taken, self._bytes = self._bytes, 0
        self.heard.clear()
        return taken

    def _counted(self, function: Callable[..., Any], place: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            for name in ("input_tensor", "tensor", "input"):
                if name in keywords:
                    sent = keywords[name]
                    break
            else:
                sent = arguments[place]
            elsewhere = keywords.get("group_src", dist.get_rank()) != dist.get_rank()
            agreed_on = function.__name__ == "all_reduce" and sent.numel() == 1
            self.calls[function.__name__] += not agreed_on
            if not agreed_on and not elsewhere:
                count = sent.numel()
                if function.__name__ == "all_to_all_single":
                    count = num_exchanged(dist.get_rank(), arguments[3])
                self._bytes += count * sent.element_size()
                self.heard.append((function.__name__, count * sent.element_size()))
            return function(*arguments, **keywords)

        return counted
