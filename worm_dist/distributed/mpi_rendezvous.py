"""MPI meeting: a script that tells one rank of mpirun its place, as JSON in the last line printed.

It is run by ``mpi.py`` in a process of its own, and so imports nothing of this package.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import mpi4py

# Otherwise the import begins MPI, and a library that does not belong here aborts the process.
mpi4py.rc.initialize = False


def main() -> None:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        sys.exit(f"mpi4py cannot load it: {' '.join(str(error).split())}")
    vendor = MPI.get_vendor()[0]
    # MPICH would abort under the mpirun of Open MPI; the other way round all would be alone.
    if (vendor == "Open MPI") != ("OMPI_COMM_WORLD_SIZE" in os.environ):
        sys.exit(f"mpi4py has loaded {vendor}")
    MPI.Init()
    world = MPI.COMM_WORLD
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    told = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(host.rank),
        "LOCAL_WORLD_SIZE": str(host.size),
        **world.bcast(_meeting(alone_on_host=host.size == world.size)),
    }
    host.Free()
    MPI.Finalize()
    print()  # some MPIs print without an end of line
    print(json.dumps(told))


def _meeting(alone_on_host: bool) -> dict[str, str]:
    address = "127.0.0.1" if alone_on_host else socket.gethostname()
    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    return {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


if __name__ == "__main__":
    main()
