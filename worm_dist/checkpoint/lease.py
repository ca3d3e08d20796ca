"""Lease: a lock file that its holder renews, so that others see whether the holder is alive.

A process id or a host name proves nothing to another host or container.  So the holder writes a new
number to the file every ``RENEWAL_SECONDS``, and a process that wants the lock watches it.  Only
changes count, timed by the watcher's own monotonic clock; clocks of hosts are never compared.

The holder writes through the descriptor with which it created the file.  If the file is replaced
meanwhile, it writes to the old one and cannot damage the new holder's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from typing_extensions import Self

from ..errors import CheckpointError, ConfigError
from ..schema import Count, Schema
from .durable_io import read_small

__all__ = ["Holder", "Lease", "content_of", "holder_in"]

RENEWAL_SECONDS = 2.0
LEASE_SECONDS = 60.0
"""Time without a renewal after which anybody may take over.  It is long, because a holder may wait
for its file system, and a watcher may see old attributes of a network file system for a while."""

_MAX_BYTES = 4096
_ELASTIC_ID, _SLURM_ID, _SLURM_RESTARTS = (
    "TORCHELASTIC_RUN_ID",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)


class Holder(Schema):
    """The content of the lock file.

    Attributes:
        token: random identifier, a new one each time that the lock is taken.
        pid: process id, in the holder's own pid namespace.
        host: host name.
        kernel_lock: identity of the lock that the holder has in its host's kernel: boot, device and
            inode; None if it has none.
        elastic_id: torchrun's ``--rdzv-id``; None without one.
        slurm_id: id of the SLURM job; None outside of one.
        slurm_restarts: number of times that SLURM has requeued the job.
        renewals: number of renewals, of 12 digits, so that the file's size never changes.
    """

    token: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\z")]
    pid: Count
    host: str
    kernel_lock: str | None
    elastic_id: str | None
    slurm_id: str | None
    slurm_restarts: Count
    renewals: Annotated[str, Field(pattern=r"^[0-9]{12}\z")] = "0" * 12

    @classmethod
    def this_process(cls, kernel_lock: str | None, environment: Mapping[str, str]) -> Self:
        """A new holding of this process.

        Args:
            kernel_lock: identity of the kernel's lock that it has, if any.
            environment: environment variables, which name the job.
        """
        elastic_id = environment.get(_ELASTIC_ID)
        restarts = environment.get(_SLURM_RESTARTS, "0")
        return cls(
            token=uuid.uuid4().hex,
            pid=os.getpid(),
            host=socket.gethostname(),
            kernel_lock=kernel_lock,
            # torchrun's default says nothing of the job.
            elastic_id=None if elastic_id in ("", "none") else elastic_id,
            slurm_id=environment.get(_SLURM_ID),
            slurm_restarts=int(restarts) if restarts.isdecimal() else 0,
        )

    def is_later_start_than(self, other: Holder) -> bool:
        """Whether SLURM has requeued the other's job since, which it does after the job's end."""
        return (
            self.slurm_id is not None
            and self.slurm_id == other.slurm_id
            and self.slurm_restarts > other.slurm_restarts
        )

    def is_of_same_job(self, other: Holder) -> bool:
        """Whether the ids of both jobs are equal; two live runs may share one, by mistake."""
        return (self.slurm_id is not None and self.slurm_id == other.slurm_id) or (
            self.elastic_id is not None and self.elastic_id == other.elastic_id
        )

    def after(self, num_renewals: int) -> bytes:
        """The content of the file after this number of renewals."""
        renewed = self.model_copy(update={"renewals": f"{num_renewals:012}"})
        return renewed.model_dump_json().encode() + b"\n"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def content_of(path: Path) -> bytes | None:
    """The content of the lock file; None if there is none."""
    try:
        return read_small(path, _MAX_BYTES)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        return b""


def holder_in(content: bytes | None) -> Holder | None:
    """The holder that the lock file names; None if it names none."""
    with suppress(ValidationError):
        return Holder.model_validate_json(content or b"")
    return None


class Lease:
    """A held lock file, renewed by a thread until ``release``.

    Args:
        path: the lock file.
        descriptor: descriptor of the file, open for writing; closed by ``release``.
        holder: what was written to the file.
    """

    def __init__(self, path: Path, descriptor: int, holder: Holder) -> None:
        self._path = path
        self._descriptor = descriptor
        self._holder = holder
        self._num_renewals = 0
        self._renewed_at = time.monotonic()
        self._successor: Holder | None = None
        self._busy = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run.lock", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """Random name of this one holding, which the lock file states."""
        return self._holder.token

    def require(self) -> None:
        """Check that the lock is still this process's; takes about a microsecond.

        Raises:
            ConfigError: another run has taken it over.
        """
        # After a suspension the training thread may run before the other one does.
        if time.monotonic() - self._renewed_at > LEASE_SECONDS / 2:
            self._renew()
        if self._successor is not None:
            raise ConfigError(
                f"{self._path}: another run has taken this directory over: {self._successor}; "
                f"this process had not renewed its lock for {LEASE_SECONDS:g} seconds, or the file "
                "was removed; nothing more is written here"
            )

    def release(self) -> None:
        """Stop renewing, and remove the file unless it is another run's by now."""
        self._released.set()
        self._thread.join(RENEWAL_SECONDS)  # not forever: its file system may hang
        content = content_of(self._path)
        holder = holder_in(content)
        # A full disk leaves a part of the content.
        is_own = self._holder.after(0).startswith(content or b"-")
        if is_own or (holder is not None and holder.token == self._holder.token):
            with suppress(OSError):
                self._path.unlink()
        if not self._thread.is_alive():
            os.close(self._descriptor)

    def _run(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            self._renew()

    def _renew(self) -> None:
        with self._busy:
            holder = holder_in(content_of(self._path))
            if holder is not None and holder.token != self._holder.token:
                self._successor = holder
                return
            # If the file was removed the run goes on: nobody else claims the directory.
            self._num_renewals += 1
            with suppress(OSError):  # tried again in two seconds
                os.pwrite(self._descriptor, self._holder.after(self._num_renewals), 0)
            self._renewed_at = time.monotonic()
