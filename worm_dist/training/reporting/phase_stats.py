"""Seconds, traffic and FLOPs of each phase of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ...engine.traffic import Traffic
from ...schema import Count, Finite, Schema
from ...verdict import Phase
from .result import Result

__all__ = ["PhaseStats", "PhaseStatsSchema"]


class PhaseStatsSchema(Schema):
    """Schema of ``PhaseStats.state_dict``."""

    run_seconds: Finite
    phase_seconds: Finite
    flops: Count
    steps: Count


class PhaseStats:
    """Collects time, traffic and FLOPs in a result; the clock starts at construction.

    Args:
        result: the result that receives the figures.
    """

    def __init__(self, result: Result) -> None:
        self._result = result
        self._run_start = self._phase_start = time.perf_counter()
        self._flops = 0
        self._steps = 0

    def count(self, phase: Phase, traffic: Traffic, flops: int) -> None:
        """Count an optimizer step.  A phase without a step keeps None as its traffic.

        Args:
            phase: the phase of the step.
            traffic: the engine's traffic.
            flops: FLOPs of one sample.
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
        """Record the duration of the phase that ends."""
        now = time.perf_counter()
        seconds, self._phase_start = round(now - self._phase_start, 3), now
        if phase is Phase.SEARCH:
            self._result.seconds.search = seconds
        elif phase is Phase.TRUNCATE:
            self._result.seconds.truncate = seconds
        elif phase is Phase.TICKET:
            self._result.seconds.ticket = seconds

    def complete(self, phase: Phase, traffic: Traffic) -> None:
        """Record the totals of the run, which ends in the given phase."""
        self.close(phase)
        self._result.seconds.total = round(time.perf_counter() - self._run_start, 3)
        if self._steps:
            self._result.flops.mean = round(self._flops / self._steps)
        self._result.traffic.total_bytes = traffic.total_sent_bytes + traffic.control_bytes

    def state_dict(self) -> dict[str, float]:
        """Seconds and FLOPs so far."""
        now = time.perf_counter()
        return {
            "run_seconds": now - self._run_start,
            "phase_seconds": now - self._phase_start,
            "flops": self._flops,
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters of a saved run."""
        now = time.perf_counter()
        self._run_start = now - state["run_seconds"]
        self._phase_start = now - state["phase_seconds"]
        self._flops, self._steps = state["flops"], state["steps"]
