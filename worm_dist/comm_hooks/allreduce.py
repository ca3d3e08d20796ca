"""All-reduce: average the live elements of a bucket over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..groups.freeze_plan import FreezePlan
from .callbacks import then
from .checksums import NUM_CHECKSUMS, Checksums
from .packing import Packing, with_parameter_strides

__all__ = ["AllReduce", "Averager", "BucketView", "completed"]


@dataclass(frozen=True)
class BucketView:
    """The live elements of a gradient bucket in one backward pass.

    Attributes:
        bucket: key of the bucket, the same in every pass.
        is_last: whether this is the last bucket of the pass.
        plan: the freeze plan; None if all slices are live.
        parameters: the parameters whose gradients are in the bucket.
        full: the bucket's full buffer.
        rows: returns views of ``full`` with the parameters' shapes, as if they were contiguous.
        packing: the packing of ``elements``; None if the whole bucket is live.
        elements: ``[live elements]``, averaged in place; ``full`` itself if all of it is live.
    """

    bucket: tuple[int, ...]
    is_last: bool
    plan: FreezePlan | None
    parameters: Sequence[Tensor]
    full: Tensor
    rows: Callable[[], Sequence[Tensor]]
    packing: Packing | None
    elements: Tensor

    @cached_property
    def gradients(self) -> Sequence[Tensor]:
        """Views of ``full`` with the parameters' shapes and strides."""
        return [
            with_parameter_strides(parameter, rows)
            for parameter, rows in zip(self.parameters, self.rows(), strict=True)
        ]

    @cached_property
    def parts(self) -> Sequence[Tensor]:
        """Views of ``elements``, one per gradient."""
        return self.rows() if self.packing is None else self.packing.parts


class Averager(Protocol):
    """A method to average the live elements of buckets over the ranks."""

    def start(
        self, view: BucketView, finish: Callable[[], Tensor]
    ) -> tuple[torch.futures.Future[Tensor], int]:
        """Start averaging ``view.elements`` in place.  Collective: the same number of elements on
        every rank.

        Args:
            view: the bucket.
            finish: called once when they are averaged, possibly in another thread.

        Returns:
            A future of what ``finish`` returns, and the bytes handed to collectives.
        """

    def state_dict(
        self, plan: FreezePlan | None, names: Mapping[Tensor, str]
    ) -> dict[str, Any] | None:
        """This rank's state between passes in plain values, by parameter name; None if there is
        none.

        Args:
            plan: the freeze plan of the next pass.
            names: the parameters' names.
        """

    def load_state_dict(
        self,
        state: Mapping[str, Any] | None,
        plan: FreezePlan | None,
        parameters: Mapping[str, Tensor],
    ) -> None:
        """Restore a state of ``state_dict``, before the first pass.

        Args:
            state: the state.
            plan: the freeze plan of the next pass.
            parameters: the averaged parameters, by name.

        Raises:
            CheckpointError: it is not of these parameters.
        """

    def release(self) -> None:
        """Let go of all buffers."""


class AllReduce:
    """Averages by one all-reduce of the elements, optionally in a lower precision.

    Args:
        process_group: the wrapper's process group.
        dtype: dtype of the sent elements; None sends them in their own.
        checksums: what compares the sums of packed buckets, if anything.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        dtype: torch.dtype | None,
        checksums: Checksums | None = None,
    ) -> None:
        self._process_group = process_group
        self._scale = 1 / dist.get_world_size(process_group)
        self._dtype = dtype
        self._checksums = checksums
        self._wires: dict[tuple[int, ...], Tensor] = {}
        self._wires_of_this_pass: dict[tuple[int, ...], Tensor] = {}

    def start(
        self, view: BucketView, finish: Callable[[], Tensor]
    ) -> tuple[torch.futures.Future[Tensor], int]:
        elements = view.elements
        if elements.numel() == 0:
            # No live element on any rank: the plan is the same on all.
            return then(completed(elements), lambda _: finish()), 0
        # Scaled before the sum, by multiplication, as DDP itself does without a hook.
        elements.mul_(self._scale)
        checksums = self._checksums if view.packing is not None else None
        if elements.is_complex():  # a cast to a real dtype would drop the imaginary part
            elements, checksums = torch.view_as_real(elements).view(-1), None
        wire = self._wire(view, elements, 0 if checksums is None else NUM_CHECKSUMS)
        sent, sums = wire[: elements.numel()], wire[elements.numel() :]
        if checksums is not None:
            checksums.put(sent, sums)
        work = dist.all_reduce(wire, group=self._process_group, async_op=True)
        reduced: torch.futures.Future[list[Tensor]] = work.get_future()

        # One callback: each future that is chained to another takes the interpreter once more.
        def averaged(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
            reduced.value()  # raises the error of a failed collective
            if checksums is not None:
                checksums.take(view.parameters, sent, sums)
            if sent.dtype != elements.dtype:
                elements.copy_(sent)
            return finish()

        # Tensors that gloo's thread let go of would take the interpreter too.
        return then(
            reduced, averaged, work=(work, view, elements, sent, sums)
        ), sent.numel() * sent.element_size()

    def state_dict(self, plan: FreezePlan | None, names: Mapping[Tensor, str]) -> None:
        return None

    def load_state_dict(
        self,
        state: Mapping[str, Any] | None,
        plan: FreezePlan | None,
        parameters: Mapping[str, Tensor],
    ) -> None:
        pass

    def release(self) -> None:
        self._wires.clear()

    def _wire(self, view: BucketView, elements: Tensor, num_more: int) -> Tensor:
        """The tensor to send: the elements with room for more behind them, in place or in a
        persistent buffer of ``dtype``."""
        if self._dtype is None or self._dtype == elements.dtype:
            return view.packing.wire if view.packing is not None and num_more else elements
        wire = self._wires.pop(view.bucket, None)
        if wire is None or wire.numel() != elements.numel() + num_more:
            wire = None  # not both at once
            wire = elements.new_empty(elements.numel() + num_more, dtype=self._dtype)
        self._wires_of_this_pass[view.bucket] = wire
        if view.is_last:  # what is left belongs to buckets that DDP has rebuilt since
            self._wires, self._wires_of_this_pass = self._wires_of_this_pass, {}
        wire[: elements.numel()].copy_(elements)
        return wire


def completed(elements: Tensor) -> torch.futures.Future[None]:
    """A completed future whose callbacks may work on the elements' device."""
    done: torch.futures.Future[None] = torch.futures.Future(
        devices=[elements.device] if elements.is_cuda else []
    )
    done.set_result(None)
    return done
