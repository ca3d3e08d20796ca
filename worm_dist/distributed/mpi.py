"""MPI: ranks that mpirun started find one another through it, and then talk through torch."""

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

_MEETING = Path(__file__).with_name("mpi_meeting.py")


def torchrun_environment(environment: Mapping[str, str], launcher: Launcher) -> dict[str, str]:
    """What torchrun would have told this process.  Collective over mpirun's ranks.

    ``MASTER_ADDR`` and ``MASTER_PORT`` are rank zero's where they are set there; otherwise rank
    zero tells its host's name and a port that is free.

    A child process meets the others and is gone before training begins.  For MPICH takes its leave
    of mpirun only in the C library's exit handlers, which the command line has to leave out: were
    MPI begun here, the first rank to end would have the others killed, and mpirun would report
    success.

    Raises:
        BackendError: mpi4py or MPI is missing, or is not the one that mpirun belongs to.
    """
    if find_spec("mpi4py") is None:
        raise BackendError(
            f"launch: {launcher.name} started this process, but mpi4py is missing; install the "
            "extra worm_dist[mpi], or start with torchrun"
        )
    # mpirun is reached through a file descriptor that it left open.
    done = subprocess.run(
        [sys.executable, str(_MEETING)],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        close_fds=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().split("\n")[-1] or f"it ended with {done.returncode}"
        raise BackendError(
            f"launch: {launcher.name} started this process, but its MPI cannot be used: {said}; "
            "set MPI4PY_LIBMPI to the libmpi.so that belongs to this mpirun, or take another mpirun"
        )
    told: dict[str, str] = json.loads(done.stdout.split("\n")[-2])
    world_size = environment.get(launcher.world_size, told["WORLD_SIZE"])
    if told["WORLD_SIZE"] != world_size:
        raise BackendError(
            f"launch: {launcher.name} says {launcher.world_size}={world_size}, but its MPI counts "
            f"{told['WORLD_SIZE']}; set MPI4PY_LIBMPI to the libmpi.so that belongs to this mpirun"
        )
    return told
