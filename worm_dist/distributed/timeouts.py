"""Timeouts: how long ranks wait for one another, and the backend's collectives for all of them.

The watchdogs name who is missing; a backend only says that it waited, and nccl may not even do
that.  So its timeout is beyond the time within which the watchdogs end a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["Timeouts", "group_timeout", "set_group_timeout", "timeout_of"]

_ROUNDS = 2.1
"""Limits that pass until all ranks that wait at one point are ended (see ``monitor``), and a tenth
for those that answer late."""
_EXTRA_SECONDS = 30


@dataclass(frozen=True)
class Timeouts:
    """How long a rank waits for the others.

    Attributes:
        starting: limit until its first step is complete, in seconds.
        steady: limit from then on, in seconds.
    """

    starting: float
    steady: float

    @property
    def grace(self) -> float:
        """Time that a rank may take to report its progress, in seconds."""
        return max(2.0, self.steady / 10)


def group_timeout(limit_seconds: float) -> timedelta:
    """How long a collective waits, if ranks may wait so long for one another."""
    return timedelta(seconds=_ROUNDS * limit_seconds + _EXTRA_SECONDS)


def set_group_timeout(limit_seconds: float) -> None:
    """Set the timeout of further collectives, in every process group of this process.

    Args:
        limit_seconds: how long ranks may wait for one another from now on.
    """
    # The public function came after torch 2.6, and the other one warns since then.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed makes groups of its own
        set_timeout(group_timeout(limit_seconds), group)


def timeout_of(group: dist.ProcessGroup) -> float:
    """The timeout of the collectives in a process group, in seconds."""
    backend: Any = group._get_backend(group._device_types[0])
    timeout: timedelta = backend.options._timeout
    return timeout.total_seconds()
