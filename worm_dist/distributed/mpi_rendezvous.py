"""Script that prints torchrun's environment variables for one rank of mpirun, as a line of JSON.

``mpi.py`` runs it in a child process, so it imports nothing from this package.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import mpi4py

# Importing MPI would initialize it, and the library of another mpirun aborts the process then.
mpi4py.rc.initialize = False


def main() -> None:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        sys.exit(f"mpi4py cannot load it: {' '.join(str(error).split())}")
    vendor = MPI.get_vendor()[0]
    # MPICH aborts under the mpirun of Open MPI; the other way round every rank gets world size 1.
    if (vendor == "Open MPI") != ("OMPI_COMM_WORLD_SIZE" in os.environ):
        sys.exit(f"mpi4py has loaded {vendor}")
    MPI.Init()
    world = MPI.COMM_WORLD
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    variables = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(host.rank),
        "LOCAL_WORLD_SIZE": str(host.size),
        **world.bcast(_master(is_single_host=host.size == world.size)),
    }
    host.Free()
    MPI.Finalize()
    print()  # some MPI libraries print without a final newline
    print(json.dumps(variables))


def _master(is_single_host: bool) -> dict[str, str]:
    address = "127.0.0.1" if is_single_host else socket.gethostname()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


if __name__ == "__main__":
    main()
