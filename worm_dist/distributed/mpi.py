"""MPI: rank and master address of a process that mpirun started; MPI is not used afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ..errors import BackendError
from .launchers import Launcher

__all__ = ["torchrun_environment"]

_RENDEZVOUS_SCRIPT = Path(__file__).with_name("mpi_rendezvous.py")


def torchrun_environment(environment: Mapping[str, str], launcher: Launcher) -> dict[str, str]:
    """The environment variables that torchrun would have set.  Collective over mpirun's ranks.

    ``MASTER_ADDR`` and ``MASTER_PORT`` are those of rank zero's environment where they are set;
    otherwise rank zero's host name and a free port on it.

    MPI runs in a child process that ends before training begins.  MPICH disconnects from mpirun
    only in the C library's exit handlers, which the command line has to skip: were MPI initialized
    in this process, mpirun would kill all ranks when the first one ends, and report success.

    Args:
        environment: environment variables of the process.
        launcher: the mpirun that started it.

    Raises:
        BackendError: mpi4py or MPI is missing, or belongs to another mpirun.
    """
    if find_spec("mpi4py") is None:
        raise BackendError(
            f"launch: {launcher.name} started this process, but mpi4py is missing; install the "
            "extra worm_dist[mpi], or start with torchrun"
        )
    # The child communicates with mpirun through an inherited file descriptor.
    process = subprocess.run(
        [sys.executable, str(_RENDEZVOUS_SCRIPT)],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        close_fds=False,
    )
    if process.returncode != 0:
        reason = process.stderr.strip().split("\n")[-1] or f"exit code {process.returncode}"
        raise BackendError(
            f"launch: {launcher.name} started this process, but its MPI cannot be used: {reason}; "
            "set MPI4PY_LIBMPI to the libmpi.so that belongs to this mpirun, or use another mpirun"
        )
    variables: dict[str, str] = json.loads(process.stdout.split("\n")[-2])
    world_size = environment.get(launcher.world_size, variables["WORLD_SIZE"])
    if variables["WORLD_SIZE"] != world_size:
        raise BackendError(
            f"launch: {launcher.name} says {launcher.world_size}={world_size}, but its MPI "
            f"counts {variables['WORLD_SIZE']} ranks; set MPI4PY_LIBMPI to the libmpi.so that "
            "belongs to this mpirun"
        )
    return variables
