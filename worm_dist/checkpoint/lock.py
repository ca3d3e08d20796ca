"""Lock that keeps two runs from writing to one directory.

``run.lock`` names the run that holds the directory; it is created exclusively, which every shared
file system supports.  Whether a process of this host still holds it is known from filelock's
``UnixFileLock``: the kernel ends that lock together with its process.  So the lock of a killed run
is taken over on its own host; on another host it is refused, as the run may be alive.

Neither of filelock's locks is enough by itself.  ``UnixFileLock`` names no holder, and on many
cluster file systems other hosts do not see it, or it is missing.  ``SoftFileLock`` names one, but
takes over that of a killed process only where two names can be exchanged: not on NFS or Lustre.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import Timeout, UnixFileLock

from ..errors import ConfigError

__all__ = ["run_lock"]

_NAME, _KERNEL_LOCK = "run.lock", ".run.flock"
_SECONDS = 1.0
"""Time to wait for another process, which may be about to release the lock."""
_HOLDER = re.compile(r"process [0-9]+ on (\S+)")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run's directory; for rank zero, around everything that writes to it.

    Args:
        folder: the run's directory, which exists.

    Raises:
        ConfigError: another run holds the lock, or the lock file cannot be written.
    """
    path, pid = folder / _NAME, os.getpid()
    with ExitStack() as stack:
        try:
            is_alone = _lock_in_kernel(folder / _KERNEL_LOCK, stack)
            _claim(path, f"process {pid} on {socket.gethostname()}", is_alone, stack)
        except Timeout as error:
            raise ConfigError(_held(path)) from error
        except OSError as error:
            raise ConfigError(
                f"{path}: the directory cannot be locked: {error.strerror}"
            ) from error
        try:
            yield
        finally:
            if os.getpid() != pid:  # a forked child leaves the lock to its parent
                stack.pop_all()


def _lock_in_kernel(path: Path, stack: ExitStack) -> bool:
    """Lock against other processes of this host, until the stack is closed.

    Returns:
        False if the file system has no such locks.

    Raises:
        Timeout: another process holds the lock.
    """
    lock = UnixFileLock(path, timeout=_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP):
            return False
        raise
    stack.callback(lock.release)
    # Before the release: a process that waits for a file that was removed creates a new one.
    stack.callback(_unlink, path)
    return True


def _claim(path: Path, own: str, is_alone: bool, stack: ExitStack) -> None:
    """Write the holder's name, until the stack is closed.

    Args:
        path: the file with the name.
        own: the name of this process.
        is_alone: True if no other process of this host holds the lock.

    Raises:
        ConfigError: it names another holder, which may be alive.
    """
    try:
        with path.open("x") as file:
            stack.callback(_remove, path, own)
            file.write(own)
    except FileExistsError:
        holder = _HOLDER.fullmatch(_content(path))
        if not is_alone or holder is None or holder[1] != socket.gethostname():
            raise ConfigError(_held(path)) from None
        stack.callback(_remove, path, own)
        path.write_text(own)


def _remove(path: Path, own: str) -> None:
    # The user may have removed the file, and another run created it again.  A full disk leaves a
    # part of the name.
    if own.startswith(_content(path)):
        _unlink(path)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _content(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _held(path: Path) -> str:
    content = _content(path)
    who = content if _HOLDER.fullmatch(content) else "one that the file does not name"
    return (
        f"{path}: another run holds this directory: {who}; choose another directory, or remove "
        "the file if that run is over"
    )
