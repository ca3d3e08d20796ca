"""ZeRO-3 plan: the collectives of a step under DeepSpeed's stage 3.

A rank holds a part of every parameter.  Small parameters stay gathered from one step to the next,
and are gathered after each.  Others are gathered when a module runs, or ahead of it, in the order
that the first passes have had, and freed after it, unless they are soon used again.  Which
parameters are gathered together decides how much is padded, so DeepSpeed's choices are repeated
here (``deepspeed/runtime/zero/partitioned_param_coordinator.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends.optimizer_view import Shard
from ..comm_hooks.shares import Shares
from ..comm_hooks.zero3_parts import live_sections, part_of, part_size
from ..groups.freeze_plan import Block
from ..truncation.memory import TruncationMemory
from .module_order import Event, innermost
from .step_time import Collective, in_backward, in_forward, in_passes
from .wrapped import LeftOut, ShardsOf, meta_shard
from .wrapper import ZeroSettings
from .zero_partitions import gradient_buckets

__all__ = ["ZeroThree"]

_NEVER = -1


class ZeroThree:
    """A network in DeepSpeed's engine of stage 3.

    Args:
        settings: DeepSpeed's settings.
        world_size: number of ranks.
    """

    def __init__(self, settings: ZeroSettings, world_size: int) -> None:
        self._settings = settings
        self._world_size = world_size

    def collectives(self, left_out: LeftOut, order: Sequence[Event]) -> list[Collective]:
        """See ``Wrapped``."""
        settings, network = self._settings, left_out.network
        persistent = _persistent(network, settings)
        in_a_pass = [
            Collective("all-gather", self._gathered(g.parameters, left_out), g.ready, g.needed)
            for g in (_gathers(network, persistent, order, settings) if self._is_spread else ())
        ]
        for parameters, ready in gradient_buckets(network, order, settings):
            needed = None if settings.reduces_early else ready
            reduced = self._reduced(parameters, left_out)
            in_a_pass.append(Collective("reduce-scatter", reduced, ready, needed))
        in_a_pass.sort(key=lambda collective: collective.ready)  # stable
        found = in_passes(in_a_pass, settings.num_passes)
        if persistent and self._is_spread:
            after = self._gathered(list(persistent), left_out)
            found.append(Collective("all-gather", after, 1.0))
        return found

    @property
    def _is_spread(self) -> bool:
        return self._world_size > 1

    def shards_of(self, network: nn.Module) -> ShardsOf:
        """See ``Wrapped``."""

        def part(parameter: Tensor) -> tuple[Shard, ...]:
            _, num_elements = part_of(parameter.numel(), self._world_size, 0)
            return (meta_shard(parameter, torch.Size((num_elements,))),)

        return part

    def packing(self, left_out: LeftOut) -> TruncationMemory | None:
        """See ``Wrapped``."""
        return None

    def gathered_bytes(self, network: nn.Module, order: Sequence[Event]) -> int:
        """See ``Wrapped``."""
        persistent = _persistent(network, self._settings)
        gathers = _gathers(network, persistent, order, self._settings)
        most = max((gather.num_available for gather in gathers), default=0)
        return (sum(p.numel() for p in persistent) + most) * self._settings.weights.itemsize

    def _reduced(self, parameters: Sequence[nn.Parameter], left_out: LeftOut) -> int:
        """Bytes of gradients that a rank hands over for a bucket."""
        element_size = self._settings.gradients.itemsize
        shares = self._shares(parameters, left_out.gradients, element_size)
        if shares is None:
            return self._world_size * self._padded_size(parameters) * element_size
        return shares.num_reduced * element_size

    def _gathered(self, parameters: Sequence[nn.Parameter], left_out: LeftOut) -> int:
        """Bytes of weights that a rank hands over when these are gathered together."""
        element_size = self._settings.weights.itemsize
        shares = self._shares(parameters, left_out.unread, element_size)
        if shares is None:
            return self._padded_size(parameters) * element_size
        return shares.num_gathered * element_size

    def _padded_size(self, parameters: Sequence[nn.Parameter]) -> int:
        return sum(part_size(p.numel(), self._world_size) for p in parameters)

    def _shares(
        self, parameters: Sequence[nn.Parameter], blocks: Mapping[Tensor, Block], element_size: int
    ) -> Shares | None:
        """The ranks' shares of these parameters; None if all of these is sent."""
        if blocks.keys().isdisjoint(parameters):
            return None
        num_ranks = self._world_size
        sections = [live_sections(blocks.get(p), p.numel(), num_ranks) for p in parameters]
        return Shares([sum(of_rank) for of_rank in zip(*sections, strict=True)], element_size, 0)


def _persistent(network: nn.Module, settings: ZeroSettings) -> dict[nn.Parameter, None]:
    """The parameters that stay gathered, in the network's order."""
    found: dict[nn.Parameter, None] = {}
    total = 0
    for parameter in network.parameters():
        size = parameter.numel()
        if size <= settings.persistent and size + total <= settings.most_persistent:
            found[parameter] = None
            total += size
    return found


class _Gather(NamedTuple):
    """Parameters that are gathered together.

    Attributes:
        num_available: elements of those that a rank then has in full, without the persistent ones.
    """

    parameters: list[nn.Parameter]
    ready: float
    needed: float
    num_available: int


class _Call(NamedTuple):
    """The begin or the end of a call of a module in the forward or backward pass."""

    is_begin: bool
    parameters: Sequence[nn.Parameter]
    time: float


def _calls(network: nn.Module, order: Sequence[Event]) -> list[_Call]:
    """Those of both passes.  The backward pass comes to modules in the reverse order."""
    called = {event.module for event in order}
    used: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        used.setdefault(innermost(name, called), []).append(parameter)
    forward = [_Call(e.is_begin, used.get(e.module, ()), in_forward(e.done)) for e in order]
    backward = [
        _Call(not e.is_begin, used.get(e.module, ()), in_backward(1 - e.done))
        for e in reversed(order)
    ]
    return forward + backward


def _gathers(
    network: nn.Module,
    persistent: Mapping[nn.Parameter, None],
    order: Sequence[Event],
    settings: ZeroSettings,
) -> list[_Gather]:
    """The gathers of a forward and backward pass, once DeepSpeed knows its order."""
    calls = _calls(network, order)
    begins = [call for call in calls if call.is_begin]
    queue = deque((p, number) for number, call in enumerate(begins) for p in call.parameters)
    fetched_for: dict[nn.Parameter, int] = {}  # the last of the calls that it is gathered for
    available = set(persistent)
    num_available = number = 0
    found: list[_Gather] = []

    def gather(parameters: Sequence[nn.Parameter], ready: float, needed: float) -> None:
        nonlocal num_available
        available.update(parameters)
        num_available += sum(p.numel() for p in parameters)
        found.append(_Gather(list(parameters), ready, needed, num_available))

    for call in calls:
        if not call.is_begin:
            for parameter in call.parameters:
                is_kept = fetched_for.get(parameter, _NEVER) > number or parameter in persistent
                if is_kept or parameter not in available:
                    continue
                if not _is_near(parameter, begins[number:], settings):
                    available.discard(parameter)
                    num_available -= parameter.numel()
            continue
        missing = [p for p in call.parameters if p not in available]
        if missing:
            gather(missing, call.time, call.time)
        queued = {p for p in call.parameters if fetched_for.get(p, _NEVER) < number}
        while queued:
            parameter, last = queue.popleft()
            fetched_for[parameter] = last
            queued.discard(parameter)
        ahead: dict[nn.Parameter, None] = {}
        room, needed = min(settings.most_live - num_available, settings.most_prefetched), 1.0
        while queue and sum(p.numel() for p in ahead) < room:
            parameter, last = queue.popleft()
            fetched_for[parameter] = max(fetched_for.get(parameter, _NEVER), last)
            if parameter not in available and parameter not in ahead:
                needed = begins[last].time if not ahead else needed
                ahead[parameter] = None
        if ahead:
            gather(list(ahead), call.time, needed)
        number += 1
    return found


def _is_near(parameter: nn.Parameter, later: Sequence[_Call], settings: ZeroSettings) -> bool:
    """Whether a parameter is used again within the distance up to which it is kept."""
    distance = 0
    for call in later:
        if distance >= settings.reuse_distance:
            return False
        if any(p is parameter for p in call.parameters):
            return True
        distance += sum(p.numel() for p in call.parameters)
    return False
