"""Launchers: which one started this process, and what it calls the process's numbers.

The first that is found counts:

1. ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``: torchrun and deepspeed set them, launch/netlab does, a
   person may.
2. mpirun.  It may use srun to reach its hosts; what srun says is then about mpirun's own helpers.
3. srun, inside a step; the shell of a batch script or of salloc is no rank.
4. None: a plain process.

torchrun or deepspeed may run below mpirun or srun, once on each host.  Their ranks then rightly
differ from those around them.  Anybody else's must agree: a forgotten ``export RANK=0`` would make
every process of mpirun or srun rank zero.
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
    "require_agreement",
    "started_by",
    "whole_number",
]


class Launcher(NamedTuple):
    """Names of the variables that a launcher sets."""

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
    """The launcher whose numbers count; None for a plain process."""
    if any(name in environment for name in TORCHRUN[1:]):
        return TORCHRUN
    return _around(environment)


def require_agreement(environment: Mapping[str, str]) -> None:
    """Compare ``RANK`` and ``WORLD_SIZE`` with what mpirun or srun says.

    Raises:
        BackendError: they differ, and neither torchrun nor deepspeed set them.
    """
    around = _around(environment)
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    by_deepspeed = "CROSS_SIZE" in environment and "LOCAL_SIZE" in environment
    # One process below mpirun or srun may as well be a shell that starts ranks of its own.
    if by_torchrun or by_deepspeed or around is None or environment.get(around[2], "1") == "1":
        return
    told = [(TORCHRUN.rank, around.rank), (TORCHRUN.world_size, around.world_size)]
    if any(environment.get(ours) != environment.get(theirs) for ours, theirs in told):
        raise BackendError(
            f"launch: {_values(environment, TORCHRUN)}, but {around.name} says "
            f"{_values(environment, around)}; unset {', '.join(TORCHRUN[1:])}, which a shell or a "
            "script has left there, or start torchrun once on each host"
        )


def whole_number(environment: Mapping[str, str], name: str) -> int:
    """The value of a variable.

    Raises:
        BackendError: it is no whole number.
    """
    try:
        return int(environment[name])
    except ValueError:
        raise BackendError(
            f"launch: {name}={environment[name]!r}: expected a whole number"
        ) from None


def _around(environment: Mapping[str, str]) -> Launcher | None:
    in_step = "SLURM_STEP_ID" in environment
    if OPEN_MPI.world_size in environment:
        return OPEN_MPI
    # srun can speak PMI too, but it does not count the ranks of a host by this name.
    if "MPI_LOCALNRANKS" in environment or (HYDRA.world_size in environment and not in_step):
        return HYDRA
    return SRUN if in_step and SRUN.rank in environment else None


def _values(environment: Mapping[str, str], launcher: Launcher) -> str:
    names = (launcher.rank, launcher.world_size)
    return ", ".join(f"{name}={environment.get(name, 'unset')}" for name in names)
