"""Reduction: what every way to send gradients knows of the generation in force."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..groups.freeze_plan import Block, FreezePlan

__all__ = ["Reducer"]


class Reducer:
    """Sends what lives, counts it, and can look for gradients in what is about to be dropped.

    Attributes:
        plan: which slices live in the generation in force; None sends everything.
        nonzero_seen: float ``[1]`` on the gradients' device, above zero once a slice that is probed
            had a gradient; None while nothing is probed.
        num_buckets_probed: buckets looked at so far.
        sent_bytes, dense_bytes: bytes handed to collectives, and bytes that would have been if
            everything lived and nothing were compressed, since ``take_bytes``.
        rests: gradients stay on their rank, and nothing is counted or remembered, for now.
    """

    def __init__(self) -> None:
        self.plan: FreezePlan | None = None
        self.nonzero_seen: Tensor | None = None
        self.num_buckets_probed = 0
        self.sent_bytes = 0
        self.dense_bytes = 0
        self.rests = False
        self._probed: Mapping[Tensor, Block] = {}

    def adopt(
        self, plan: FreezePlan, held: FreezePlan | None = None, moving: Collection[Tensor] = ()
    ) -> None:
        """Send by another plan from the next backward pass on; the ranks have agreed on it.

        Args:
            plan: which gradients are sent.
            held: which weights change, if these are others: columns whose gradients are not sent
                may still decay.
            moving: parameters of which frozen slices change all the same.
        """
        self.plan = plan
        self.nonzero_seen = None

    def probe(self, plan: FreezePlan, device: torch.device) -> None:
        """Note in the next backward passes whether a slice that this plan freezes has a gradient
        on this rank."""
        self._probed = plan.blocks
        self.nonzero_seen = torch.zeros(1, device=device)
        self.num_buckets_probed = 0

    def probe_bucket(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Look at one bucket, parameters with their gradients, before it is averaged.
        Synchronises nothing."""
        if self.nonzero_seen is None:
            return
        self.num_buckets_probed += 1
        for parameter, gradient in gradients:
            block = self._probed.get(parameter)
            for dim, frozen in block.frozen.items() if block is not None else ():
                # NaN is not zero either.
                self.nonzero_seen += (gradient.index_select(dim, frozen) != 0).any()

    def take_bytes(self) -> tuple[int, int]:
        """Bytes sent, and bytes of a dense step, since the last call."""
        taken = self.sent_bytes, self.dense_bytes
        self.sent_bytes = self.dense_bytes = 0
        return taken

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """What this rank has of its own between two steps, in plain values.

        Args:
            names: of the parameters.
        """
        return {"sent_bytes": self.sent_bytes, "dense_bytes": self.dense_bytes, "averaging": None}

    def load_state_dict(self, state: Mapping[str, Any], network: nn.Module) -> None:
        """Go on from a state, by the plan that is in force already."""
        self.sent_bytes, self.dense_bytes = state["sent_bytes"], state["dense_bytes"]

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Send, count and remember nothing for a while."""
        self.rests = True
        try:
            yield
        finally:
            self.rests = False

    def remove(self) -> None:
        """Send everything from now on."""
        self.plan = None
        self.nonzero_seen = None
        self._probed = {}
