"""Lock: one run writes to one directory."""

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
_PATIENCE = 1.0
"""Seconds for a holder to write its name, once it has made the file."""


class _Holder(Part):
    """Who holds the lock.

    Attributes:
        began: tells a process from a later one of the same number; "" where that is not known.
    """

    host: str
    pid: Annotated[int, Field(ge=1)]
    began: str

    @property
    def is_gone(self) -> bool:
        """It ran on this host, and runs no more."""
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
    """Hold a run's directory; on rank zero, around everything that writes to it.

    Args:
        folder: of the run; it exists.

    Raises:
        ConfigError: another run holds it, or the lock cannot be written.
    """
    path = folder / _NAME
    mine = _Holder(host=socket.gethostname(), pid=os.getpid(), began=_began(os.getpid()))
    try:
        _acquire(path, mine)
    except OSError as error:
        raise ConfigError(f"{path}: the directory cannot be locked: {error.strerror}") from error
    try:
        yield
    finally:
        _release(path, mine)


def _acquire(path: Path, mine: _Holder) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with suppress(FileExistsError):
            _create(path, mine)
            return
        with suppress(FileNotFoundError):  # released meanwhile
            holder = _holder(path.read_bytes())
            if holder is not None and not holder.is_gone:
                raise ConfigError(_held(path, holder))
            if holder is not None and _take_over(path, mine):
                return
        if time.monotonic() > deadline:
            raise ConfigError(_held(path, None))
        time.sleep(0.02)


def _create(path: Path, mine: _Holder) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, mine.model_dump_json().encode())
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _take_over(path: Path, mine: _Holder) -> bool:
    """Put my name in the place of one who is gone; False if somebody else did."""
    with path.open("r+b") as file:
        # Of several who found the same name one goes first; the others then find its name.
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = _holder(file.read())
        same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not same or holder is None or not holder.is_gone:
            return False
        file.seek(0)
        file.write(mine.model_dump_json().encode())
        file.truncate()
        return True


def _release(path: Path, mine: _Holder) -> None:
    # A child that was forked leaves by this way too; and somebody may have removed the file.
    with suppress(OSError):
        if os.getpid() == mine.pid and _holder(path.read_bytes()) == mine:
            path.unlink()


def _holder(content: bytes) -> _Holder | None:
    try:
        return _Holder.model_validate_json(content)
    except ValidationError:
        return None


def _held(path: Path, holder: _Holder | None) -> str:
    who = f"process {holder.pid} on {holder.host}" if holder else "one that it does not name"
    return (
        f"{path}: another run holds this directory: {who}; choose another directory, or remove "
        "the file if that run is over"
    )


def _began(pid: int) -> str:
    """When a process began, since which start of the machine; Linux says so."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name of the program is in brackets and may hold blanks.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{boot} {ticks}"
