"""Collective calls: names a call of the engine by its place in the training, for attendance."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch.distributed as dist

from ..backends.optimizer_view import StepListener
from ..distributed.attendance import Attendance

__all__ = ["CollectiveCalls"]


class CollectiveCalls(StepListener):
    """Detects that this rank calls ``check`` or ``draw`` and another does not, or the reverse.

    A call is named by the optimizer step and the number of passes since, the same on all ranks.

    Args:
        process_group: the process group of the ranks; None on a single process.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._attendance = Attendance(process_group)
        self._step = 0
        self._num_passes = 0
        self._draw_offered = False

    def at(self, call: str, is_collective: bool = True) -> AbstractContextManager[None]:
        """A context in which the collectives of a call run; see ``Attendance.at``."""
        return self._attendance.at(self._name(call), is_collective)

    def offer_draw(self, is_offered: bool) -> None:
        """Record whether every rank is to call ``draw`` before its next pass."""
        self._draw_offered = is_offered

    def before_pass(self, check_is_due: bool) -> None:
        """Mark the calls that are due as skipped, so that ranks waiting in them fail.

        Args:
            check_is_due: whether every rank was to call ``check`` before this pass.
        """
        if check_is_due:
            self._attendance.mark_skipped(self._name("check"))
        if self._draw_offered:
            self._attendance.mark_skipped(self._name("draw"))
        self._num_passes += 1

    def after_step(self, step: int) -> None:
        self._step, self._num_passes, self._draw_offered = step, 0, False

    def _name(self, call: str) -> str:
        passes = f", {self._num_passes} passes later" if self._num_passes else ""
        return f"{call} at step {self._step}{passes}"
