"""Tally: what each phase of a run takes and sends in a step, and what a step computes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ...engine.step_hooks import Traffic
from ...verdict import Phase
from .result import Result

__all__ = ["PhaseStats"]


class PhaseStats:
    """Notes it in a result, from the moment it is made.

    Args:
        result: whose figures they are.
    """

    def __init__(self, result: Result) -> None:
        self._result = result
        self._began = self._phase_began = time.perf_counter()
        self._flops = 0
        self._steps = 0

    def count(self, phase: Phase, traffic: Traffic, flops: int) -> None:
        """A step has been taken in that phase.  A phase that ends before its first one has sent
        nothing, and its figure stays None.

        Args:
            phase: of the engine.
            traffic: of the engine.
            flops: of one sample.
        """
        figures = self._result.traffic
        self._flops += flops
        self._steps += 1
        if phase is Phase.TRUNCATE:
            figures.truncated_bytes_per_step = traffic.sent_bytes
        elif phase is Phase.TICKET:
            figures.ticket_bytes_per_step = traffic.sent_bytes
        else:
            figures.dense_bytes_per_step = traffic.dense_bytes

    def close(self, phase: Phase) -> None:
        """The phase is over, and the next one begins."""
        now = time.perf_counter()
        seconds, self._phase_began = round(now - self._phase_began, 3), now
        if phase is Phase.SEARCH:
            self._result.seconds.search = seconds
        elif phase is Phase.TRUNCATE:
            self._result.seconds.truncate = seconds
        elif phase is Phase.TICKET:
            self._result.seconds.ticket = seconds

    def complete(self, phase: Phase, traffic: Traffic) -> None:
        """The run is over, in that phase."""
        self.close(phase)
        self._result.seconds.total = round(time.perf_counter() - self._began, 3)
        if self._steps:
            self._result.flops.mean = round(self._flops / self._steps)
        self._result.traffic.total_bytes = traffic.total_sent_bytes + traffic.control_bytes

    def state_dict(self) -> dict[str, float]:
        """Seconds and operations so far."""
        now = time.perf_counter()
        return {
            "run_seconds": now - self._began,
            "phase_seconds": now - self._phase_began,
            "flops": self._flops,
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        now = time.perf_counter()
        self._began, self._phase_began = now - state["run_seconds"], now - state["phase_seconds"]
        self._flops, self._steps = state["flops"], state["steps"]
