"""Detects the launcher that started this process, by the environment variables that it sets.

The first one found is used:

1. ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``: set by torchrun, deepspeed, launch/netlab or by hand.
2. mpirun.  It may use srun to reach its hosts; srun's variables then describe mpirun's own helpers.
3. srun, inside a job step; the shell of a batch script or of salloc is no rank.
4. None: a process started without a launcher.

torchrun or deepspeed may run below mpirun or srun, once on each host.  Their ranks then rightly
differ from those of the outer launcher.  Ranks set in any other way must agree with it: a forgotten
``export RANK=0`` would make every process of mpirun or srun rank zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import BackendError

__all__ = [
    "HYDRA",
    "OPEN_MPI",
    "SRUN",
    "TORCHRUN",
    "Launcher",
    "launchers_seen",
    "read_int",
    "require_agreement",
    "started_by",
]


class Launcher(NamedTuple):
    """A launcher and the environment variables that it sets.

    Attributes:
        name: the launcher's name, for messages.
        rank: name of the variable with the rank.
        world_size: name of the variable with the number of ranks.
        local_rank: name of the variable with the rank within the host.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str


TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
OPEN_MPI = Launcher(
    "the mpirun of Open MPI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
)
HYDRA = Launcher("the mpirun of MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
SRUN = Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def started_by(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that assigned this process's rank; None for a process started without one."""
    if any(name in environment for name in TORCHRUN[1:]):
        return TORCHRUN
    return _outer_launcher(environment)


def launchers_seen(environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The variables of each launcher that are set, by its name, whether it is used or not."""
    found = {
        launcher.name: {name: environment[name] for name in launcher[1:] if name in environment}
        for launcher in (TORCHRUN, OPEN_MPI, HYDRA, SRUN)
    }
    return {name: variables for name, variables in found.items() if variables}


def require_agreement(environment: Mapping[str, str]) -> None:
    """Check ``RANK`` and ``WORLD_SIZE`` against the variables of mpirun or srun, if any are set.

    Raises:
        BackendError: they differ, and were set neither by torchrun nor by deepspeed.
    """
    outer = _outer_launcher(environment)
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    by_deepspeed = "CROSS_SIZE" in environment and "LOCAL_SIZE" in environment
    if by_torchrun or by_deepspeed or outer is None:
        return
    # A single process below mpirun or srun may be a shell that starts ranks of its own.
    if environment.get(outer.world_size, "1") == "1":
        return
    pairs = [(TORCHRUN.rank, outer.rank), (TORCHRUN.world_size, outer.world_size)]
    if any(environment.get(inner) != environment.get(name) for inner, name in pairs):
        raise BackendError(
            f"launch: {_values(environment, TORCHRUN)}, but {outer.name} says "
            f"{_values(environment, outer)}; unset {', '.join(TORCHRUN[1:])}, which a shell or a "
            "script has left there, or start torchrun once on each host"
        )


def read_int(environment: Mapping[str, str], name: str) -> int:
    """The value of an environment variable as an integer.

    Raises:
        BackendError: the value is not an integer.
    """
    try:
        return int(environment[name])
    except ValueError:
        raise BackendError(
            f"launch: {name}={environment[name]!r}: expected a whole number"
        ) from None


def _outer_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """mpirun or srun, if one of them started this process or its parent."""
    in_step = "SLURM_STEP_ID" in environment
    if OPEN_MPI.world_size in environment:
        return OPEN_MPI
    # srun can set the PMI variables too, but not MPI_LOCALNRANKS.
    if "MPI_LOCALNRANKS" in environment or (HYDRA.world_size in environment and not in_step):
        return HYDRA
    return SRUN if in_step and SRUN.rank in environment else None


def _values(environment: Mapping[str, str], launcher: Launcher) -> str:
    names = (launcher.rank, launcher.world_size)
    return ", ".join(f"{name}={environment.get(name, 'unset')}" for name in names)
