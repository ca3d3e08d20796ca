"""ZeRO plan: the collectives of a step under DeepSpeed's stages 0 to 2.

Gradients are reduced in buckets.  In stages 1 and 2 every rank steps its partition of the weights,
which lie in one row, and the partitions are gathered after the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backends.optimizer_view import Shard
from ..comm_hooks.shares import Shares
from ..groups.freeze_plan import Block
from ..truncation.memory import TruncationMemory
from .module_order import Event, innermost
from .step_time import Collective, in_backward, in_passes
from .wrapped import LeftOut, ShardsOf, meta_shard
from .wrapper import ZeroSettings

__all__ = ["ZeroPartitions", "gradient_buckets"]

_ALIGNMENT = 2
"""A partition's length is a multiple of this many elements, for nccl."""


class ZeroPartitions:
    """A network in DeepSpeed's engine, with one parameter group.

    By default DeepSpeed all-reduces a bucket also where a partition would do
    (``use_multi_rank_bucket_allreduce``).

    Args:
        settings: DeepSpeed's settings.
        world_size: number of ranks.
    """

    def __init__(self, settings: ZeroSettings, world_size: int) -> None:
        self._settings = settings
        self._world_size = world_size

    def collectives(self, left_out: LeftOut, order: Sequence[Event]) -> list[Collective]:
        """See ``Wrapped``."""
        settings, element_size = self._settings, self._settings.gradients.itemsize
        found = []
        for parameters, ready in gradient_buckets(left_out.network, order, settings):
            num_live = sum(_num_live(left_out.gradients, p) for p in parameters)
            if settings.stage < 2 and not settings.reduces_early:
                ready = 1.0
            needed = None if settings.reduces_early else ready
            found.append(Collective("all-reduce", num_live * element_size, ready, needed))
        if settings.stage == 2:  # the others reduce after the last pass
            found = in_passes(found, settings.num_passes)
        if settings.stage > 0 and self._world_size > 1:
            found.append(Collective("all-gather", self._gathered(left_out), 1.0))
        return found

    def shards_of(self, network: nn.Module) -> ShardsOf:
        """See ``Wrapped``."""
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        shards: dict[Tensor, Shard] = {
            parameter: meta_shard(parameter, _shape_of(parameter, num_elements), first)
            for parameter, first, num_elements in self._partitions(trained)[0]
        }
        return lambda parameter: (shards[parameter],) if parameter in shards else ()

    def packing(self, left_out: LeftOut) -> TruncationMemory | None:
        """See ``Wrapped``."""
        return None  # the buffer of the gathers after a step is not in it

    def gathered_bytes(self, network: nn.Module, order: Sequence[Event]) -> int:
        """See ``Wrapped``: every rank has all weights."""
        return 0

    def _gathered(self, left_out: LeftOut) -> int:
        """Bytes of weights that a rank hands over after a step."""
        trained = [p for p in left_out.network.parameters() if p.requires_grad]
        element_size = self._settings.weights.itemsize
        if not left_out.unchanged:
            return self._row(trained)[1] // self._world_size * element_size
        shares = [
            sum(
                left_out.unchanged[parameter].part(first, num_elements).num_live
                if parameter in left_out.unchanged
                else num_elements
                for parameter, first, num_elements in partition
            )
            for partition in self._partitions(trained)
        ]
        return Shares(shares, element_size, 0).num_gathered * element_size

    def _partitions(
        self, parameters: Sequence[nn.Parameter]
    ) -> list[list[tuple[nn.Parameter, int, int]]]:
        """For each rank, the parameters of which it has elements, the first of them, and how
        many."""
        num_ranks = self._world_size if self._settings.stage else 1
        places, length = self._row(parameters)
        size = length // num_ranks
        found: list[list[tuple[nn.Parameter, int, int]]] = [[] for _ in range(num_ranks)]
        for parameter, place in zip(parameters, places, strict=True):
            end = place + parameter.numel()
            for rank in range(place // size, -(-end // size)):
                first, last = max(place, rank * size), min(end, (rank + 1) * size)
                found[rank].append((parameter, first - place, last - first))
        return found

    def _row(self, parameters: Sequence[nn.Parameter]) -> tuple[list[int], int]:
        """Where parameters begin in the row that is cut into partitions, and its length."""
        numbers = list(range(len(parameters)))
        if self._settings.round_robin:
            numbers = [
                n for rank in range(self._world_size) for n in numbers[rank :: self._world_size]
            ]
        unit = 16 // self._settings.weights.itemsize if self._settings.is_aligned else 1
        places, end = [0] * len(parameters), 0
        for number in numbers:
            places[number] = end + -end % unit
            end = places[number] + parameters[number].numel()
        return places, end + -end % (_ALIGNMENT * self._world_size)


def gradient_buckets(
    network: nn.Module, order: Sequence[Event], settings: ZeroSettings
) -> list[tuple[list[nn.Parameter], float]]:
    """The parameters whose gradients are reduced together, and when: as soon as the next gradient
    is there that would make the bucket too large.

    Args:
        network: the network.
        order: the calls of its modules.
        settings: DeepSpeed's settings.
    """
    begun: dict[str, float] = {}
    for event in order:
        begun.setdefault(event.module, event.done)
    trained = {
        parameter: in_backward(1 - begun[innermost(name, begun)])
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    buckets: list[tuple[list[nn.Parameter], float]] = []
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter, ready in sorted(trained.items(), key=lambda item: item[1]):
        if bucket and size + parameter.numel() > settings.bucket:
            buckets.append((bucket, ready))
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    return [*buckets, (bucket, 1.0)]


def _num_live(blocks: Mapping[Tensor, Block], parameter: nn.Parameter) -> int:
    return blocks[parameter].num_live if parameter in blocks else parameter.numel()


def _shape_of(parameter: Tensor, num_elements: int) -> torch.Size:
    return parameter.shape if num_elements == parameter.numel() else torch.Size((num_elements,))
