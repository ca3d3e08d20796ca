"""Lock file that keeps two runs from writing to one directory."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ..errors import ConfigError
from .durable_io import Part

__all__ = ["run_lock"]

_NAME = "run.lock"
_SECONDS_TO_WRITE = 1.0
"""Time for a holder to write its identity, once it has created the file."""


class _Holder(Part):
    """The process that holds the lock.

    Attributes:
        host: host name of the process.
        pid: process ID on that host.
        began: boot ID of the host and start time of the process, which distinguish it from a later
            process with the same ID; "" where they are not known.
    """

    host: str
    pid: Annotated[int, Field(ge=1)]
    began: str

    @property
    def is_gone(self) -> bool:
        """Whether the process ran on this host and has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass
        return self.began != _began(self.pid)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run's directory; for rank zero, around everything that writes to it.

    Args:
        folder: the run's directory, which exists.

    Raises:
        ConfigError: another run holds the lock, or the lock file cannot be written.
    """
    path = folder / _NAME
    own = _Holder(host=socket.gethostname(), pid=os.getpid(), began=_began(os.getpid()))
    try:
        _acquire(path, own)
    except OSError as error:
        raise ConfigError(f"{path}: the directory cannot be locked: {error.strerror}") from error
    try:
        yield
    finally:
        _release(path, own)


def _acquire(path: Path, own: _Holder) -> None:
    deadline = time.monotonic() + _SECONDS_TO_WRITE
    while True:
        with suppress(FileExistsError):
            _create(path, own)
            return
        with suppress(FileNotFoundError):  # released meanwhile
            holder = _holder(path.read_bytes())
            if holder is not None and not holder.is_gone:
                raise ConfigError(_held(path, holder))
            if holder is not None and _take_over(path, own):
                return
        if time.monotonic() > deadline:
            raise ConfigError(_held(path, None))
        time.sleep(0.02)


def _create(path: Path, own: _Holder) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, own.model_dump_json().encode())
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _take_over(path: Path, own: _Holder) -> bool:
    """Replace a holder that has ended; returns whether this process did so, and not another."""
    with path.open("r+b") as file:
        # Of several processes that found the same holder, the first replaces it; the others then
        # find the first one here.
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = _holder(file.read())
        same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not same or holder is None or not holder.is_gone:
            return False
        file.seek(0)
        file.write(own.model_dump_json().encode())
        file.truncate()
        return True


def _release(path: Path, own: _Holder) -> None:
    # A forked child gets here too, and the user may have removed the file.
    with suppress(OSError):
        if os.getpid() == own.pid and _holder(path.read_bytes()) == own:
            path.unlink()


def _holder(content: bytes) -> _Holder | None:
    try:
        return _Holder.model_validate_json(content)
    except ValidationError:
        return None


def _held(path: Path, holder: _Holder | None) -> str:
    who = f"process {holder.pid} on {holder.host}" if holder else "one that the file does not name"
    return (
        f"{path}: another run holds this directory: {who}; choose another directory, or remove "
        "the file if that run is over"
    )


def _began(pid: int) -> str:
    """The boot ID of this host and the start time of a process, as Linux reports them; else ""."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The program's name is in parentheses and may contain spaces.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{boot} {ticks}"
