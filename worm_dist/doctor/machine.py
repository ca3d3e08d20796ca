"""The machine: versions of the software, processors, and limits of this process."""

from __future__ import annotations

import os
import resource
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from ..distributed.file_limit import needed_file_descriptors
from ..training.reporting.result import versions
from .finding import Finding, note, ok

__all__ = ["devices", "open_files", "software"]

_OPTIONAL = ("deepspeed", "mpi4py", "timm")
_RANKS_OF_A_LARGE_RUN = 1024


def software() -> Finding:
    """The versions of Python, of the packages, and of those that only some runs need."""
    found, missing = versions(), []
    for package in _OPTIONAL:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    without = f"; without {', '.join(missing)}" if missing else ""
    return ok("software", listed + without)


def devices(local_world_size: int) -> list[Finding]:
    """The GPUs that this process sees, and whether the ranks of this host share its cores.

    Args:
        local_world_size: number of ranks on this host.
    """
    num_gpus, cores = torch.cuda.device_count(), _num_cores()
    findings = []
    if num_gpus:
        try:
            names = [torch.cuda.get_device_name(index) for index in range(num_gpus)]
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            return [note("devices", f"{num_gpus} GPUs that cannot be used: {reason}")]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        findings.append(ok("devices", f"{kinds}; {cores} cores"))
    elif shutil.which("nvidia-smi") is not None:
        built = torch.version.cuda
        reason = f"built for CUDA {built}" if built else "built without CUDA"
        findings.append(
            note(
                "devices",
                f"nvidia-smi is here, but torch {torch.__version__} ({reason}) sees no GPU; look "
                "at CUDA_VISIBLE_DEVICES and at the driver's version",
            )
        )
    else:
        findings.append(ok("devices", f"no GPU; {cores} cores"))
    threads = torch.get_num_threads()
    if not num_gpus and local_world_size > 1 and local_world_size * threads > cores:
        findings.append(
            note(
                "devices",
                f"{local_world_size} ranks with {threads} threads each share {cores} cores; set "
                f"OMP_NUM_THREADS={max(1, cores // local_world_size)}",
            )
        )
    return findings


def _num_cores() -> int:
    """The cores that this process may use, which a container or a job may limit."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_files(rank: int, world_size: int) -> Finding:
    """The limit on open files.  That it is high enough for this run, the start checks by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    limit = "no hard limit on open files" if unlimited else f"ulimit -Hn is {hard}"
    if world_size > 1:
        needed = needed_file_descriptors(rank, world_size)
        return ok("open files", f"{limit}; rank {rank} of {world_size} needs {needed}")
    needed = needed_file_descriptors(0, _RANKS_OF_A_LARGE_RUN)
    enough = unlimited or hard >= needed
    of_large = f"{needed} are needed for {_RANKS_OF_A_LARGE_RUN} ranks"
    return ok("open files", f"{limit}; {of_large}{'' if enough else ', this is for fewer'}")
