"""SLURM: the place of a task that srun started, and where the tasks meet.

Every task works it out of its own environment: nothing is asked of anybody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import BackendError
from .launchers import whole_number

__all__ = ["first_host", "torchrun_environment"]

# Below those that the kernel hands out to connections, which could hold one of them by chance.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000

_NEEDED = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
)


def torchrun_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have told this task.

    ``MASTER_ADDR`` and ``MASTER_PORT`` stay as they are where they are set.  Otherwise the tasks
    meet on the step's first host, which has task zero (and not on the host that srun was called
    on: that may be a login node), at a port that neighbouring jobs and steps do not share.

    Raises:
        BackendError: srun has left something out, or it cannot be read.
    """
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        raise BackendError(
            f"launch: inside a step of srun, but without {', '.join(missing)}; hand srun's whole "
            "environment on, or start with torchrun"
        )
    job, step, node = (
        whole_number(environment, name)
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID")
    )
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_on(node, environment["SLURM_STEP_TASKS_PER_NODE"])),
        "MASTER_ADDR": environment.get(
            "MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"])
        ),
        "MASTER_PORT": environment.get(
            "MASTER_PORT", str(_FIRST_PORT + (16 * job + step) % _NUM_PORTS)
        ),
    }


def first_host(nodes: str) -> str:
    """``rack1n[003-007,12],login`` begins with ``rack1n003``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _tasks_on(node: int, tasks_per_node: str) -> int:
    """``4(x2),3``: four on each of two nodes, and three on the next."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            break
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        raise BackendError(
            f"launch: SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} does not say how many tasks "
            f"node {node} has"
        )
    return counts[node]
