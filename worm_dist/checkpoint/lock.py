"""Lock that keeps two runs from writing to one directory.

``run.lock`` names the run that holds the directory, and is renewed by it: see ``lease``.  It is
created exclusively, which every shared file system supports.  That of a killed run is taken over

- at once, if the killed run had a lock in the kernel that this process has now.  The kernel ends
  filelock's ``UnixFileLock`` together with its process, in whichever container that was;
- at once by its own job, if SLURM has requeued it since;
- by its own job otherwise when it was not renewed for ``_JOB_SECONDS``, and by anybody when it was
  not renewed for ``LEASE_SECONDS``.

Neither of filelock's locks is enough by itself.  ``UnixFileLock`` names no holder, and on many
cluster file systems other hosts do not see it, or it is missing.  ``SoftFileLock`` names one, but
takes over that of a killed process only where two names can be exchanged: not on NFS or Lustre.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from filelock import Timeout, UnixFileLock

from ..errors import ConfigError
from . import lease
from .lease import Holder, Lease, content_of, holder_in

__all__ = ["is_held", "is_lock", "run_lock"]

logger = logging.getLogger(__name__)

_NAME, _KERNEL_LOCK = "run.lock", ".run.flock"
_SECONDS = 1.0
"""Time to wait for another process, which may be about to release the lock."""
_JOB_SECONDS = 10.0
"""Time without a renewal after which the same job may take over: five renewals."""
_POLL_SECONDS = 0.2
_MOST_ATTEMPTS = 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_SUCH_LOCKS = (errno.ENOSYS, errno.ENOTSUP)


def is_held(folder: Path, token: str) -> bool:
    """Whether the lock of a run's directory, as this host sees it, is the one of this name."""
    holder = holder_in(content_of(folder / _NAME))
    return holder is not None and holder.token == token


def is_lock(name: str) -> bool:
    """Whether a file name in a run's directory is that of a lock."""
    return name == _KERNEL_LOCK or name.lstrip(".").startswith(_NAME)


@contextmanager
def run_lock(folder: Path, environment: Mapping[str, str] = os.environ) -> Iterator[Lease]:
    """Lock a run's directory; for rank zero, around everything that writes to it.

    It may wait for as long as a lease takes to run out.

    Args:
        folder: the run's directory, which exists.
        environment: environment variables, which name the job.

    Yields:
        The lease; its ``require`` raises if another run has taken the directory over.

    Raises:
        ConfigError: another run holds the lock, or the lock file cannot be written.
    """
    path, pid = folder / _NAME, os.getpid()
    with ExitStack() as stack:
        try:
            try:
                kernel_lock = _lock_in_kernel(folder / _KERNEL_LOCK, stack)
                is_free = True
            except Timeout:
                _require_other_kernel(path)
                kernel_lock, is_free = None, False
            own = Holder.this_process(kernel_lock, environment)
            descriptor = _claim(path, own, is_free)
        except OSError as error:
            raise ConfigError(
                f"{path}: the directory cannot be locked: {error.strerror}"
            ) from error
        held = Lease(path, descriptor, own)
        stack.callback(held.release)
        try:
            yield held
        finally:
            if os.getpid() != pid:  # a forked child leaves the lock to its parent
                stack.pop_all()


def _lock_in_kernel(path: Path, stack: ExitStack) -> str | None:
    """Lock against other processes of this host, until the stack is closed.

    Returns:
        The identity of the lock: the kernel, as of its boot, device and inode.  Whoever has written
        the same down has had this very lock, and no longer has it.  None if the file system has no
        such locks, or the kernel has no name.

    Raises:
        Timeout: another process holds the lock.
    """
    lock = UnixFileLock(path, timeout=_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno in _NO_SUCH_LOCKS:
            return None
        raise
    stack.callback(lock.release)
    # Before the release: a process that waits for a file that was removed creates a new one.
    stack.callback(_unlink, path)
    kernel, status = _kernel(), path.stat()
    return kernel and f"{kernel}:{status.st_dev}:{status.st_ino}"


def _kernel() -> str | None:
    """The name of this boot of this kernel, which no other host has."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return None


def _require_other_kernel(path: Path) -> None:
    """Raise unless the lock in the kernel may be that of another host that died.

    The server of a network file system keeps it for a while, and then only the lease tells.

    Raises:
        ConfigError: its holder is alive.
    """
    holder = holder_in(content_of(path))
    kernel = _kernel()
    if holder is None or holder.kernel_lock is None or kernel is None:
        _refuse(holder, path)
    if holder.kernel_lock.startswith(kernel):
        _refuse(holder, path)


def _claim(path: Path, own: Holder, is_free: bool) -> int:
    """Create the lock file, or take it over.

    Args:
        path: the lock file.
        own: what is written to it.
        is_free: False if somebody holds the lock in the kernel.

    Returns:
        The file's descriptor.

    Raises:
        ConfigError: another run holds the lock.
    """
    for _ in range(_MOST_ATTEMPTS):
        descriptor = _create(path, own)
        if descriptor is not None:
            return descriptor
        found = content_of(path)
        if found is None:
            continue
        holder = holder_in(found)
        if not (is_free and holder is not None and _is_over(holder, own)):
            is_same_job = is_free and holder is not None and own.is_of_same_job(holder)
            _watch(path, found, _JOB_SECONDS if is_same_job else lease.LEASE_SECONDS)
        _take_away(path, found, own.token)
    _refuse(holder_in(content_of(path)), path)


def _create(path: Path, own: Holder) -> int | None:
    """Create the lock file; None if there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return None
    try:
        os.pwrite(descriptor, own.after(0), 0)
    except OSError:
        _unlink(path)
        os.close(descriptor)
        raise
    return descriptor


def _is_over(holder: Holder, own: Holder) -> bool:
    """Whether the holder is known to have ended."""
    had_this_lock = holder.kernel_lock is not None and holder.kernel_lock == own.kernel_lock
    return had_this_lock or own.is_later_start_than(holder)


def _watch(path: Path, found: bytes, seconds: float) -> None:
    """Return if the lock file is not renewed for this time, or goes away.

    Args:
        path: the lock file.
        found: its content.
        seconds: how long to watch.

    Raises:
        ConfigError: it was renewed, or another run was faster.
    """
    message = "%s: held by %s; waiting up to %g seconds to see whether that run is alive"
    logger.warning(message, path, holder_in(found) or "an unnamed run", seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        now = content_of(path)
        if now is None:
            return
        if now != found:
            _refuse(holder_in(now), path)


def _take_away(path: Path, found: bytes, token: str) -> None:
    """Remove the lock file of a run that is over; leave any other one.

    Only one process can rename a file.  Between the look at the file and the renaming another
    process may have replaced it; then it is put back.

    Args:
        path: the lock file.
        found: its content.
        token: the token of this process.
    """
    if content_of(path) != found:
        return
    taken = path.with_name(f".{path.name}.{token}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return
    if content_of(taken) != found:
        try:
            os.link(taken, path)
        except FileExistsError:
            pass  # the run that is deprived of its lock finds the other one's token
        except OSError:  # a file system without hard links
            taken.rename(path)
    _unlink(taken)


def _refuse(holder: Holder | None, path: Path) -> NoReturn:
    who = "one that the file does not name" if holder is None else f"{holder}"
    raise ConfigError(
        f"{path}: another run holds this directory: {who}; it is at work, so choose another "
        "directory, or wait for its end"
    )


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
