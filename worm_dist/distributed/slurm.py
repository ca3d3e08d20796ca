"""SLURM: rank and master address of a task that srun started.

Every task derives them from its own environment, without communication.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import BackendError
from .launchers import read_int

__all__ = ["first_host", "torchrun_environment"]

# Below the kernel's ephemeral ports, any of which may be in use by a connection.
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
    """The environment variables that torchrun would have set for this task.

    ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set.  Otherwise the address is that
    of the step's first host, which runs task zero (and not the host on which srun was called, which
    may be a login node), and the port is one that neighbouring jobs and steps do not use.

    Args:
        environment: environment variables of the task.

    Raises:
        BackendError: a variable of srun is missing or cannot be parsed.
    """
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        raise BackendError(
            f"launch: inside a step of srun, but without {', '.join(missing)}; pass srun's whole "
            "environment on to the process, or start with torchrun"
        )
    job, step, node = (
        read_int(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID")
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
    """The first host of a SLURM node list: ``rack1n003`` for ``rack1n[003-007,12],login``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _tasks_on(node: int, tasks_per_node: str) -> int:
    """The number of tasks on a node: ``4(x2),3`` is 4 on each of two nodes and 3 on the next."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            break
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise BackendError(
            f"launch: SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} does not say how many tasks "
            f"node {node} has"
        )
    return counts[node]
