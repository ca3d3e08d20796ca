"""Zero columns: weights that read channels which put out zeros have no gradients to send.

A channel that has left puts out exact zeros, so the gradients of the columns that read it are exact
zeros, and leaving them out changes nothing but the payload: it is the ticket's own size before the
ticket is drawn.  That is checked, not assumed: all ranks probe the columns for a step, agree by one
number on what was seen, and then drop them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..comm_hooks.reducer import Reducer
from ..distributed.collectives import Communicator

__all__ = ["ZeroColumns"]

logger = logging.getLogger(__name__)

_MOST_PROBES = 3
"""Once may be an overflow, for which a loss scaler skips a step."""

_MOST_TIMES = 16
"""Each time that columns are dropped, buckets are packed anew; so they go together."""


class ZeroColumns:
    """Which columns are probed, and which are dropped.

    Attributes:
        dropped: bool ``[num_channels]``, those whose columns are not sent.
    """

    def __init__(self, num_channels: int) -> None:
        self.dropped = torch.zeros(num_channels, dtype=torch.bool)
        self._probed = torch.zeros_like(self.dropped)
        self._sent_for_good = torch.zeros_like(self.dropped)
        self._num_probes = 0

    def seen(self, reduction: Reducer, ranks: Communicator, step: int) -> bool:
        """A step is over: whether further columns are to be dropped.  Collective if columns were
        probed in it."""
        if reduction.nonzero_seen is None or not reduction.num_buckets_probed:
            return False
        if not ranks.any(reduction.nonzero_seen):
            self.dropped = self.dropped | self._probed
            self._num_probes = 0
            return True
        reduction.nonzero_seen = None
        self._num_probes += 1
        if self._num_probes == _MOST_PROBES:
            self._num_probes = 0
            self._sent_for_good = self._sent_for_good | self._probed
            logger.warning(
                "step %d: removed channels still reach the layers behind them, whose columns stay "
                "in the gradient all-reduce",
                step,
            )
        return False

    def probe(self, zero: Tensor, frozen: Tensor, start: Callable[[Tensor], None]) -> None:
        """Probe what has become zero: if it is enough, or if nothing else can become zero for now.

        Args:
            zero: bool ``[num_channels]``, channels that put out zeros from the next step on.
            frozen: bool of the same shape; of these others may yet become zero.
            start: probes the columns that read these channels in the next step.
        """
        new = zero & ~self.dropped & ~self._sent_for_good
        num_new = int(new.sum())
        if num_new and (num_new * _MOST_TIMES >= int(frozen.sum()) or bool(zero[frozen].all())):
            self._probed = new
            start(new)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "dropped": self.dropped.clone(),
            "probed": self._probed.clone(),
            "sent_for_good": self._sent_for_good.clone(),
            "num_probes": self._num_probes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.dropped = state["dropped"].to("cpu", copy=True)
        self._probed = state["probed"].to("cpu", copy=True)
        self._sent_for_good = state["sent_for_good"].to("cpu", copy=True)
        self._num_probes = state["num_probes"]
