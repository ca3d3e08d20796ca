"""The launcher: what the environment variables say, and who uses them."""

from __future__ import annotations

from collections.abc import Mapping

from ..distributed.init import RankInfo
from ..distributed.launchers import TORCHRUN, launchers_seen, started_by
from ..errors import BackendError
from .finding import Finding, note, ok, problems

__all__ = ["launch"]


def launch(environment: Mapping[str, str]) -> tuple[RankInfo | None, list[Finding]]:
    """This process's rank, None if the variables contradict one another, and what was found.

    Collective if mpirun started this process.

    Args:
        environment: environment variables of the process.
    """
    launcher, seen = started_by(environment), launchers_seen(environment)
    if launcher is None:
        return RankInfo(0, 1, 0), [ok("launcher", "none: one process"), *_in_slurm(environment)]
    try:
        rank_info = RankInfo.from_environment(environment)
    except BackendError as error:
        return None, problems("launcher", error)
    name = launcher.name
    if launcher == TORCHRUN and "TORCHELASTIC_RUN_ID" not in environment:
        name = "deepspeed" if "CROSS_SIZE" in environment else "RANK and WORLD_SIZE, set by hand"
    address = f"; rank zero at {rank_info.address}:{rank_info.port}" if rank_info.address else ""
    findings = [
        ok(
            "launcher",
            f"{name}: rank {rank_info.rank} of {rank_info.world_size}, {rank_info.local_rank} of "
            f"{rank_info.local_world_size} on this host{address}",
        )
    ]
    for other, variables in seen.items():
        if other != launcher.name:
            words = ", ".join(f"{key}={value}" for key, value in variables.items())
            findings.append(ok("launcher", f"{words}: of {other}, outside of {name}; not used"))
    return rank_info, findings


def _in_slurm(environment: Mapping[str, str]) -> list[Finding]:
    if "SLURM_JOB_ID" not in environment:
        return []
    return [
        note(
            "launcher",
            f"SLURM_JOB_ID={environment['SLURM_JOB_ID']}, but this is no step of srun: start the "
            "ranks with srun, or with torchrun on each host",
        )
    ]
