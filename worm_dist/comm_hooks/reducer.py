"""Reducer: base class of the gradient reducers, with the plan in force and byte counters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..groups.freeze_plan import Block, FreezePlan
from ..schema import Count, Schema
from .checksums import Checksums
from .powersgd_state import AveragerSchema

__all__ = ["Reducer", "ReducerSchema"]


class ReducerSchema(Schema):
    """Schema of ``Reducer.state_dict``."""

    sent_bytes: Count
    dense_bytes: Count
    averager: AveragerSchema | None


class Reducer:
    """Reduces live gradients, counts bytes, and probes columns for non-zero gradients.

    Attributes:
        plan: the freeze plan of the generation in force; None reduces everything.
        unread: the slices of channels whose output is exactly zero: whoever gathers weights may
            leave them out, and read zeros instead; None if there are none.
        nonzero_seen: float ``[1]`` on the gradients' device, above zero once a probed slice had a
            non-zero gradient; None while nothing is probed.
        num_buckets_probed: number of buckets probed so far.
        sent_bytes, dense_bytes: bytes handed to collectives since ``take_bytes``, and bytes that
            would have been without freezing and compression.
        paused: whether gradients are left unreduced and uncounted for now.
        checksums: what compares the sums of packed buckets; None if nothing does.
    """

    checksums: Checksums | None = None

    def __init__(self) -> None:
        self.plan: FreezePlan | None = None
        self.unread: FreezePlan | None = None
        self.nonzero_seen: Tensor | None = None
        self.num_buckets_probed = 0
        self.sent_bytes = 0
        self.dense_bytes = 0
        self.paused = False
        self._probed: Mapping[Tensor, Block] = {}

    def set_plan(
        self,
        plan: FreezePlan,
        held: FreezePlan,
        fading_params: Collection[Tensor],
        unread: FreezePlan | None,
    ) -> None:
        """Use another plan from the next backward pass on; the ranks have agreed on it.

        Args:
            plan: the slices whose gradients are left out.
            held: the slices whose weights do not change: columns whose gradients are left out may
                still decay.
            fading_params: parameters with frozen slices that change all the same.
            unread: see the attribute.
        """
        self.plan, self.unread = plan, unread
        self.nonzero_seen = None
        self._follow(plan, held, fading_params)

    def _follow(self, plan: FreezePlan, held: FreezePlan, fading: Collection[Tensor]) -> None:
        """Discard what was made for the plan before, and make what this one needs; see
        ``set_plan``."""

    def probe(self, plan: FreezePlan, device: torch.device) -> None:
        """Record in the next backward passes whether a slice frozen by this plan has a non-zero
        gradient on this rank; see ``nonzero_seen``."""
        self._probed = plan.blocks
        self.nonzero_seen = torch.zeros(1, device=device)
        self.num_buckets_probed = 0

    def probe_bucket(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Probe one bucket before it is averaged, without host-device synchronisation.

        Args:
            gradients: pairs of a parameter and its gradient.
        """
        if self.nonzero_seen is None:
            return
        self.num_buckets_probed += 1
        for parameter, gradient in gradients:
            block = self._probed.get(parameter)
            for dim, frozen in block.frozen.items() if block is not None else ():
                # A NaN counts as non-zero.
                self.nonzero_seen += (gradient.index_select(dim, frozen) != 0).any()

    def take_bytes(self) -> tuple[int, int]:
        """``sent_bytes`` and ``dense_bytes``; resets both."""
        taken = self.sent_bytes, self.dense_bytes
        self.sent_bytes = self.dense_bytes = 0
        return taken

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """This rank's state between two steps in plain values.

        Args:
            names: the parameters' names.
        """
        return {"sent_bytes": self.sent_bytes, "dense_bytes": self.dense_bytes, "averager": None}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Restore a state; the plan in force must be set before.

        Args:
            state: the state.
            parameters: the averaged parameters, by name.

        Raises:
            CheckpointError: it is not of these parameters.
        """
        self.sent_bytes, self.dense_bytes = state["sent_bytes"], state["dense_bytes"]

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context in which gradients are neither reduced nor counted."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def remove(self) -> None:
        """Reduce everything from now on."""
        self.plan = self.unread = None
        self.nonzero_seen = None
        self._probed = {}
