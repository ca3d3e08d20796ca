"""Averaging: how the ranks average what lives of a bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..groups.freeze_plan import FreezePlan
from .packing import Packing

__all__ = ["AllReduce", "Averager", "BucketView", "completed"]


@dataclass(frozen=True)
class BucketView:
    """What lives of a bucket, in one backward pass.

    Attributes:
        bucket: which bucket; the same in every pass.
        is_last: no other bucket follows in this pass.
        plan: which slices live; None if all do.
        parameters: whose gradients are in it.
        whole: the bucket.
        gradients: views of it, as the parameters lie in memory.
        packing: how ``elements`` were packed; None if the whole bucket lives.
        elements: ``[live elements]``, averaged in place; ``whole`` itself if all of it lives.
        parts: views of ``elements``, one for each gradient.
    """

    bucket: tuple[int, ...]
    is_last: bool
    plan: FreezePlan | None
    parameters: Sequence[Tensor]
    whole: Tensor
    gradients: Sequence[Tensor]
    packing: Packing | None
    elements: Tensor
    parts: Sequence[Tensor]


class Averager(Protocol):
    """A way to average."""

    def start(self, payload: BucketView) -> tuple[torch.futures.Future[None], int]:
        """Average the payload's elements in place.  Collective: every rank brings as many.

        Returns:
            A future that is done when they are averaged, and how many bytes are handed to
            collectives.
        """

    def remembered(
        self, plan: FreezePlan | None, names: Mapping[Tensor, str]
    ) -> dict[str, Any] | None:
        """What this rank remembers from pass to pass, in plain values, by the parameters' names;
        None if it remembers nothing.

        Args:
            plan: which slices will live in the next pass.
            names: of the parameters.
        """

    def remember(
        self,
        state: Mapping[str, Any] | None,
        plan: FreezePlan | None,
        parameters: Mapping[str, Tensor],
    ) -> None:
        """Go on from what ``remembered`` gave, before the first pass."""


class AllReduce:
    """One all-reduce of the elements, which may be rounded for it.

    Args:
        process_group: that of the wrapper.
        dtype: what elements are rounded to; None leaves them as they are.
    """

    def __init__(self, process_group: dist.ProcessGroup, dtype: torch.dtype | None) -> None:
        self._process_group = process_group
        self._dtype = dtype
        self._wires: dict[tuple[int, ...], Tensor] = {}

    def start(self, payload: BucketView) -> tuple[torch.futures.Future[None], int]:
        elements = payload.elements
        if elements.numel() == 0:
            # Nothing lives in this bucket, on any rank: the plan is the same on all.
            return completed(elements), 0
        # Scaled before the sum, by multiplication, as DDP itself does without a hook.
        elements.mul_(1 / dist.get_world_size(self._process_group))
        if elements.is_complex():  # rounded as they are, they would lose their imaginary part
            elements = torch.view_as_real(elements)
        wire = self._wire(payload, elements)
        work = dist.all_reduce(wire, group=self._process_group, async_op=True)
        reduced: torch.futures.Future[list[Tensor]] = work.get_future()

        def widened(reduced: torch.futures.Future[list[Tensor]]) -> None:
            reduced.value()  # raises what went wrong
            if wire is not elements:
                elements.copy_(wire)

        return reduced.then(widened), wire.numel() * wire.element_size()

    def remembered(self, plan: FreezePlan | None, names: Mapping[Tensor, str]) -> None:
        return None

    def remember(
        self,
        state: Mapping[str, Any] | None,
        plan: FreezePlan | None,
        parameters: Mapping[str, Tensor],
    ) -> None:
        pass

    def _wire(self, payload: BucketView, elements: Tensor) -> Tensor:
        """The elements as they are sent: themselves, or rounded into a buffer that is kept."""
        if self._dtype is None or self._dtype == elements.dtype:
            return elements
        wire = self._wires.get(payload.bucket)
        if wire is None or wire.numel() != elements.numel():
            wire = self._wires[payload.bucket] = torch.empty_like(elements, dtype=self._dtype)
        return wire.copy_(elements)


def completed(elements: Tensor) -> torch.futures.Future[None]:
    """A future that is done; what follows it may work on the elements' device."""
    done: torch.futures.Future[None] = torch.futures.Future(
        devices=[elements.device] if elements.is_cuda else []
    )
    done.set_result(None)
    return done
