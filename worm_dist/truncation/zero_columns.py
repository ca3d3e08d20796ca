"""Zero columns: leave out the gradients of weight columns whose input channels are zero.

The output of a removed channel is exactly zero, and so are the gradients of the input columns that
read it.  Without them the payload has the ticket's size before the ticket is drawn.  That they are
zero is checked, not assumed: all ranks probe the columns for a step, all-reduce one number, and
drop the columns only if no rank has seen a non-zero gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..comm_hooks.reducer import Reducer
from ..distributed.collectives import Communicator
from ..schema import Count, Flags, Schema

__all__ = ["ZeroColumns", "ZeroColumnsSchema"]

logger = logging.getLogger(__name__)

_MOST_PROBES = 3
"""Probes after which columns are sent for good.  One non-zero probe may be an overflow, for which a
loss scaler skips the step."""

_MOST_TIMES = 16
"""How often columns are dropped at most, since every time buckets are packed anew."""


class ZeroColumnsSchema(Schema):
    """Schema of ``ZeroColumns.state_dict``."""

    dropped: Flags
    probed: Flags
    sent_for_good: Flags
    num_probes: Count

    def vectors(self) -> dict[str, Tensor]:
        """The tensors with one element for each channel, by key."""
        return {key: value for key, value in self if isinstance(value, Tensor)}


class ZeroColumns:
    """Tracks which columns are probed, and which are dropped from the all-reduce.

    Attributes:
        dropped: bool ``[num_channels]``: channels whose consumers' columns are not sent.
    """

    def __init__(self, num_channels: int) -> None:
        self.dropped = torch.zeros(num_channels, dtype=torch.bool)
        self._probed = torch.zeros_like(self.dropped)
        self._sent_for_good = torch.zeros_like(self.dropped)
        self._num_probes = 0

    def after_step(self, reducer: Reducer, comm: Communicator, step: int) -> bool:
        """Evaluate the probe after an optimizer step.  Collective if columns were probed in it.

        Returns:
            Whether ``dropped`` has grown.
        """
        if reducer.nonzero_seen is None or not reducer.num_buckets_probed:
            return False
        if not comm.any(reducer.nonzero_seen):
            self.dropped = self.dropped | self._probed
            self._num_probes = 0
            return True
        reducer.nonzero_seen = None
        self._num_probes += 1
        if self._num_probes == _MOST_PROBES:
            self._num_probes = 0
            self._sent_for_good = self._sent_for_good | self._probed
            logger.warning(
                "step %d: non-zero gradients seen in columns expected to be zero; removed channels "
                "still reach the next layers, whose columns stay in the gradient all-reduce",
                step,
            )
        return False

    def probe(self, zero: Tensor, frozen: Tensor, start: Callable[[Tensor], None]) -> None:
        """Start a probe of new zero channels, if there are enough, or if no others are expected.

        Args:
            zero: bool ``[num_channels]``: channels whose output is zero from the next step on.
            frozen: bool ``[num_channels]``: channels that are, or may become, zero.
            start: called with bool ``[num_channels]``; probes the columns that read these channels
                in the next step.
        """
        new = zero & ~self.dropped & ~self._sent_for_good
        num_new = int(new.sum())
        if num_new and (num_new * _MOST_TIMES >= int(frozen.sum()) or bool(zero[frozen].all())):
            self._probed = new
            start(new)

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values."""
        return {
            "dropped": self.dropped.clone(),
            "probed": self._probed.clone(),
            "sent_for_good": self._sent_for_good.clone(),
            "num_probes": self._num_probes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.dropped = state["dropped"].to("cpu", copy=True)
        self._probed = state["probed"].to("cpu", copy=True)
        self._sent_for_good = state["sent_for_good"].to("cpu", copy=True)
        self._num_probes = state["num_probes"]

    @staticmethod
    def pruned_state(state: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
        """A state of ``state_dict`` after channels have been removed; see ``Truncation``."""
        return {k: v[kept] if isinstance(v, Tensor) else v for k, v in state.items()}
