"""Batches of a loader; names the cause when loader processes run out of shared memory."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ...errors import ConfigError

__all__ = ["batches"]

_SHARED_MEMORY = "/dev/shm"
_CAUSES = ("unable to allocate shared memory", "signal: Bus error")
"""What torch says of a loader process that could not pass a batch on."""

_failures: list[Exception] = []
"""Kept, because the destructor of an iterator that was not completed would print a traceback."""


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a loader.

    Raises:
        ConfigError: there is too little shared memory for the loader processes.
    """
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        if not loader.num_workers or not _is_out_of_shared_memory(error):
            raise
        _failures.append(error)
        raise ConfigError(
            f"data.num_workers: {_SHARED_MEMORY}{_size()} is too small for {loader.num_workers} "
            "loader processes on each rank; give the container more (docker run --ipc=host, or "
            "--shm-size=8g), use fewer of them, or set data.num_workers to 0"
        ) from error


def _is_out_of_shared_memory(error: OSError | RuntimeError) -> bool:
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC  # for a semaphore
    return is_full or any(cause in str(error) for cause in _CAUSES)


def _size() -> str:
    try:
        return f", {shutil.disk_usage(_SHARED_MEMORY).total / 2**20:,.3g} MiB,"
    except OSError:
        return ""
